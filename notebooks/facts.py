"""What is asked of a notebook's variables once it has run on the real model: expressions, by notebook and name.

The values are kept with the outputs, and tests/test_notebooks.py holds the words of the notebook against them.
"""

from __future__ import annotations

FACTS: dict[str, dict[str, str]] = {
    "depth_bench": {},
    "tour": {
        "forwards": "[first.done.forwards, again.done.forwards, lens.provenance['counts']['forwards'], voids.provenance['counts']['forwards']]",
        "said": "late[late['layer'] == 29].sort_values('prompt')['token'].tolist()",
        "whole": "whole",
        "without": "without.tolist()",
        "same": "bool((loaded.tables['activity'] == voids.tables['activity']).all(axis=None))",
        "controls": "voids.tables['controls'].set_index('variant')['kl_to_full'].to_dict()",
    },
    "voids": {
        "used": "{f'{a} {p}': v for (a, p), v in usage.mean().items()}",
        "late": "{f'{a} {p}': v for (a, p), v in (usage.loc[20:].mean() - usage.loc[2:19].mean()).items()}",
        "kl": "{f'{a} {v}': [row.kl_to_full, row.kl_low, row.kl_high] for (a, v), row in controls.iterrows()}",
        "phases": "strict.loc[[21, 24], 'difference'].tolist()",
        "skipping": "result.tables['controls'].groupby('alpha')['layers_used'].nunique().tolist()",
    },
    "logit_lens": {
        "end": "curve.loc[29].to_dict()",
        "start": "curve.loc[5].to_dict()",
        "decided": "decided.groupby(easy, observed=True).mean().to_dict()",
        "median": "decided.median()",
        "answer": "read.query('prompt == 0 and layer == 29')['final_token'].iloc[-1]",
    },
    "lenses": {
        "kl": "kl.to_dict()",
        "ends": "result.tables['read'].query('layer == 29')[['agrees', 'kl_to_final']].agg(['min', 'max']).to_dict()",
        "forwards": "[r.provenance['counts']['forwards'] for r in (plain, through)]",
        "errors": "jacobian.relative_error",
        "lift": "bool((result.tables['patchscope']['control_max'] >= result.tables['patchscope']['unpatched']).all())",
    },
    "back_patching": {
        "summary": "summary.to_dict('records')",
        "rates": "rates.set_index(['set', 'position_name', 'variant'])['oracle_rate'].rename(str).reset_index().to_dict('records')",
        "upper": "bool((result.tables['grid']['source_layer'] > result.tables['grid']['target_layer']).all())",
        "known": "bool(cases.loc[cases['patched'], ['first_hop', 'second_hop']].all(axis=None))",
    },
    "communication_channels": {
        "pairs": "len(composition)",
        "best": "strongest.iloc[0][['source_layer', 'source_head', 'target_layer', 'target_head', 'component']].astype(int).tolist()",
        "z": "strongest['z'].tolist()",
        "out": "[outstanding(composition['score']), outstanding(composition['component_score'])]",
        "beaten": "rank[['components_beaten', 'directions_beaten']].min().tolist()",
    },
    "concept_depth": {
        "depths": "depths.to_dict('index')",
        "layers": "result.tables['scores']['layer'].nunique()",
    },
    "latent_language": {
        "cannot": "translation.tables['summary'].set_index('pair')['accuracy'].to_dict()",
        "notes": "translation.notes",
        "repeats": "repetition.tables['summary'].iloc[0][['accuracy', 'peak', 'leads_in_middle']].tolist()",
        "curve": "curve.loc[29].to_dict()",
        "controls": "bool(repetition.tables['curve']['control_mean'].notna().all())",
    },
    "depth_use": {
        "score": "result.tables['depth_score'].query(\"by == 'mean'\").set_index('variant')['score'].to_dict()",
        "worst": "measured.sort_values(ascending=False).head(4).index.tolist()",
        "first": "contributions.loc[:1, 'relative_norm'].median()",
        "rest": "contributions.loc[2:, 'relative_norm'].median()",
        "foretold": "agreement[(agreement['proxy_b'] == 'delta_ce_block') & (agreement['proxy_a'] == 'skip_effect_block')]['spearman'].iloc[0]",
    },
    "norm_removal": {
        "sites": "len(effect)",
        "alone": "effect['diverged'].max()",
        "mlps": "together.set_index('site')['diverged']['all mlp']",
        "spike": "spike",
        "sinks": "[sinks['rate'], sinks['uniform']]",
        "error": "total[['nmae']].iloc[0].tolist()",
        "interval": "bool(total[['ci_low', 'ci_high']].notna().any(axis=None))",
    },
    "causal_patching": {
        "kept": "int(result.tables['pairs']['kept'].sum())",
        "bounds": "window.dropna(subset='layer').set_index(['role', 'bound'])['layer'].to_dict().__repr__()",
        "top": "float(result.tables['verification']['spearman'].iloc[0])",
        "end": "float(result.tables['map'].query(\"component == 'resid_post' and role == 'end' and layer == 29\")['recovery'].min())",
        "planned": "planned.total",
        "ran": "result.provenance['counts']['intervention_forwards']",
    },
    "contextual_decomposition": {
        "n": "len(heads)",
        "best": "heads.iloc[0][['score', 'ablation']].tolist()",
        "pearson": "agreement['pearson'].to_dict()",
        "kept": "faithfulness.set_index('method').query('size < 10')[['faithfulness', 'random_high']].to_numpy().tolist()",
    },
    "live": {
        "kl": "patched.compare(layers=False).kl",
        "country": "float(difference[8, 3])",
        "single": "session.edit('patch resid_post.20 @7 from other').compare(layers=False).kl",
        "swept": "float(effect.kl[20, 7])",
        "unchanged": "session.compare(layers=False).kl",
    },
    "passage_use": {
        "correct": "result.tables['prompts'][['correct', 'correct_without']].mean().tolist()",
        "used": "loss.index[loss['low'] > 0].tolist()",
        "most": "int(loss['mean'].idxmax())",
        "looked": "int(mass.idxmax())",
        "drop": "means.loc['sim_drop', 'low'].gt(0).sum()",
        "gain": "fusion['gain'].to_dict()",
        "above": "fusion['gain_high'].to_dict()",
    },
    "layer_programs": {
        "planned": "analysis.interventions(model, [None] * 8).total",
        "ran": "result.provenance['counts']['intervention_forwards']",
        "exact": "mending == task.record.question('mending:e1').truth",
        "test": "search.tables['programs']['test'].tolist()",
        "undone": "search.tables['fragility'].query(\"change == 'undone'\")['survived'].max()",
        "swapped": "float(result.tables['swaps'].query(\"protocol == 'interchange'\")['kl'].median())",
        "replaced": "float(result.tables['swaps'].query(\"protocol == 'replacement'\")['kl'].median())",
    },
}

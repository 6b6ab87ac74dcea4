"""The worked examples of the Live page."""

from __future__ import annotations

EXAMPLES = {
    "A fact, patched": (
        "model smollm2-135m\ntext 'The capital of France is the city of'\nother 'The capital of Italy is the city of'\n"
        "watch ' Paris' ' Rome'\nedit patch resid_post.8 @3 from other@3"
    ),
    "Indirect object (IOI)": (
        "model smollm2-135m\ntext 'When Mary and John went to the store, John gave a drink to'\n"
        "other 'When Mary and John went to the store, Mary gave a drink to'\nwatch ' Mary' ' John'\nedit zero z.17.1 @last"
    ),
    "A question of two steps": (
        "model smollm2-135m\ntext 'The capital of the country where the Eiffel Tower stands is'\nwatch ' Paris' ' London'\n"
        "edit skip 12"
    ),
    "A latent language": (
        'model smollm2-135m\ntext \'Français: "fleur" - Deutsch: "Blume"\\nFrançais: "eau" - Deutsch: "\'\nwatch \'W\' \'water\'\n'
        "edit zero mlp_out.20 @last"
    ),
}
"""Worked examples; the first is on the page when it is opened first."""

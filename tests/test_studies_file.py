"""Study files: what they mean, and what is refused before anything runs, by name and line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from study_makers import BASE, line_of, model_folder, prompt_file, study_file

from analyses.cli import main
from analyses.registry import ANALYSES
from analyses.running.model_spec import ModelSpec
from analyses.studies import AnalysisSpec, Override, PromptSet, Study, StudyError, StudyModel, expand, read_study
from analyses.studies.cells import MAX_CELLS, Cell

VOIDS = '[[analyses]]\nanalysis = "voids"\n'
Fault = Callable[[str], tuple[str, Path]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model_folder(tmp_path / "model")
    prompt_file(tmp_path / "ids.jsonl")
    return tmp_path


def cells_of(folder: Path, text: str) -> tuple[Cell, ...]:
    return expand(read_study(study_file(folder, BASE + text)))


@pytest.fixture
def refused(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Fault:
    """Runs `bathyscope batch` on a study that must be refused; returns the message and the file."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("probes.models.load.load_model", never)

    def run(text: str) -> tuple[str, Path]:
        path = study_file(folder, text)
        out = folder / "out"
        code = main(["batch", str(path), "--out", str(out), "--store", str(folder / "store"), "--workers", "0"])
        said = capsys.readouterr().err
        assert code == 2, said
        assert "Traceback" not in said
        assert not out.exists()
        return said, path

    return run


def test_the_shipped_study_runs_every_registered_analysis(folder: Path) -> None:
    studies = Path(__file__).parents[1] / "studies"
    text = (studies / "depth.toml").read_text(encoding="utf-8").replace("../analyses", f"{studies.parent}/analyses")
    for ref in ("smollm2-135m", "gemma3-270m"):
        assert f'ref = "{ref}"' in text
        text = text.replace(f'ref = "{ref}"', f'ref = "{folder / ref}"')  # so that no model is fetched for this
        model_folder(folder / ref)
    cells = expand(read_study(study_file(folder, text)))
    assert {cell.analysis.name for cell in cells} == set(ANALYSES)


def test_every_combination_is_a_cell(folder: Path) -> None:
    cells = cells_of(
        folder,
        'seeds = [0, 1]\n[[prompts]]\nname = "more"\ntokens = [[3, 4]]\n'.replace("seeds = [0, 1]\n", "")
        + VOIDS
        + 'vary.alpha = [0.2, 0.8]\nvary.mode = ["measure", "skip", "early_exit"]\n'
        + '[[analyses]]\nanalysis = "logit_lens"\nprompts = ["more"]\n',
    )
    assert len(cells) == 2 * 3 * 2 + 1
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.varied["alpha"] for cell in cells[:-1]} == {(0.2,), (0.8,)}
    assert cells[-1].prompts is not None
    assert cells[-1].prompts.label == "more"
    assert cells[-1].seed is None, "the lens draws nothing"


def test_seeds_multiply_what_draws_at_random(folder: Path) -> None:
    text = "seeds = [3, 4]" + BASE + VOIDS + '[[analyses]]\nanalysis = "logit_lens"\n'
    text += '[[analyses]]\nname = "fixed"\nanalysis = "voids"\noptions.seed = 9\n'
    cells = expand(read_study(study_file(folder, text)))
    assert [(cell.entry, cell.seed) for cell in cells] == [
        ("voids", 3), ("voids", 4), ("logit_lens", None), ("fixed", 9),
    ]  # fmt: skip


def test_a_name_is_the_hash_of_what_decides_the_result(folder: Path) -> None:
    (plain,) = cells_of(folder, VOIDS)
    (relabelled,) = cells_of(folder, '[[analyses]]\nname = "other"\nanalysis = "voids"\noptions.alpha = 0.8\n')
    assert relabelled.name == plain.name, "labels and written-out defaults change nothing"
    (option,) = cells_of(folder, VOIDS + "options.alpha = 0.7\n")
    (seed,) = expand(read_study(study_file(folder, "seeds = [1]" + BASE + VOIDS)))
    prompt_file(folder / "ids.jsonl", [[5, 6, 7, 8], [9, 10], [11, 12, 14]])
    (prompts,) = cells_of(folder, VOIDS)
    prompt_file(folder / "ids.jsonl")
    model_folder(folder / "model", seed=1)
    (model,) = cells_of(folder, VOIDS)
    assert len({plain.name, option.name, seed.name, prompts.name, model.name}) == 5


def test_overrides_change_and_leave_out_single_cells(folder: Path) -> None:
    cells = cells_of(
        folder,
        '[[prompts]]\nname = "more"\ntokens = [[3, 4]]\n'
        + VOIDS
        + '[[overrides]]\nprompts = "more"\noptions.alpha = 0.1\n'
        + '[[analyses]]\nanalysis = "logit_lens"\n[[overrides]]\nprompts = "more"\nanalysis = "logit_lens"\nskip = true\n',
    )
    alphas = {(c.entry, c.prompts.label): getattr(c.analysis, "alpha", None) for c in cells if c.prompts}
    assert alphas == {("voids", "ids"): (0.8,), ("voids", "more"): (0.1,), ("logit_lens", "ids"): None}


def test_included_lists_come_first_and_its_seeds_stand(folder: Path) -> None:
    study_file(folder, BASE.replace("small", "base") + "[[overrides]]\nskip = true\nanalysis = 'voids'\n", "base.toml")
    study_file(folder, 'include = ["base.toml"]\nseeds = [5]\ntitle = "Two"\n', "two.toml")
    path = study_file(folder, 'include = ["two.toml", "base.toml"]\nname = "top"\n' + VOIDS)
    study = read_study(path)
    assert (study.name, study.title, study.seeds) == ("top", "Two", (5,))
    assert [len(part) for part in (study.models, study.prompts, study.analyses, study.overrides)] == [1, 1, 1, 1]


def test_python_and_file_make_the_same_cells(folder: Path) -> None:
    study = Study(
        "small",
        models=(StudyModel(ModelSpec(str(folder / "model"))),),
        prompts=(PromptSet("ids", folder / "ids.jsonl"),),
        analyses=(AnalysisSpec("voids", vary={"alpha": (0.2, 0.8)}),),
        overrides=(Override(analysis="voids", options={"mode": "measure"}),),
    )
    text = VOIDS + 'vary.alpha = [0.2, 0.8]\n[[overrides]]\nanalysis = "voids"\noptions.mode = "measure"\n'
    assert [c.name for c in expand(study)] == [c.name for c in cells_of(folder, text)]


def test_a_study_in_python_is_refused_without_a_file(folder: Path) -> None:
    model, prompts = StudyModel(ModelSpec(str(folder / "model"))), PromptSet("ids", folder / "ids.jsonl")
    with pytest.raises(StudyError, match=r"^unknown analysis 'viods'. Did you mean 'voids'"):
        expand(Study("x", (model,), (AnalysisSpec("viods"),), (prompts,)))


def test_a_misspelt_analysis(refused: Fault) -> None:
    said, path = refused(BASE + VOIDS + '[[analyses]]\nname = "b"\nanalysis = "logit_lense"\n')
    assert line_of(path, "logit_lense") in said
    assert "Did you mean 'logit_lens'?" in said


def test_an_unknown_model_in_the_last_cell(refused: Fault) -> None:
    said, path = refused(BASE + '[[models]]\nname = "last"\nref = "smolm2-135m"\n' + VOIDS)
    assert line_of(path, "smolm2-135m") in said
    assert "Did you mean 'smollm2-135m'?" in said


@pytest.mark.parametrize(
    ("text", "line", "occurrence"),
    [
        ('[[models]]\nname = "model"\nref = "smollm2-135m"\n', 'name = "model"', 1),
        ('[[models]]\nref = "model"\n', "[[models]]", 2),
        ('[[prompts]]\nname = "ids"\ntexts = ["a"]\n', 'name = "ids"', 2),
        (VOIDS + VOIDS, "[[analyses]]", 2),
    ],
)
def test_a_duplicate_name(refused: Fault, text: str, line: str, occurrence: int) -> None:
    said, path = refused(BASE + text)
    assert f"error: {line_of(path, line, occurrence)}:" in said
    assert "is named twice, first at" in said


def test_a_cyclic_include(refused: Fault, folder: Path) -> None:
    other = study_file(folder, '\n\ninclude = ["study.toml"]\n', "other.toml")
    said, _ = refused('include = ["other.toml"]\n' + BASE + VOIDS)
    assert f"{line_of(other, 'include')}: cyclic include: study.toml -> other.toml -> study.toml" in said


def test_a_matrix_of_a_million_cells(refused: Fault) -> None:
    numbers = ", ".join(str(i) for i in range(1, 101))
    lists = "".join(f"vary.{name} = [{numbers}]\n" for name in ("max_new_tokens", "temperature"))
    text = f"seeds = [{', '.join(map(str, range(100)))}]\n" + BASE + '[[analyses]]\nanalysis = "logit_lens"\n' + VOIDS
    said, path = refused(text + lists)
    assert f"error: {line_of(path, '[[analyses]]', 2)}: study 'small' is a matrix of 1,000,001 cells" in said
    assert f"at most {MAX_CELLS:,}" in said


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (VOIDS + "options.alfa = 1\n", "alfa", "unknown option of voids 'alfa'. Did you mean 'alpha'"),
        (VOIDS + "options.alpha = [\n0.1,\n1.5]\noptions.seed = 1\n", "alpha", "alpha is 1.5: legal values are 0 to 1"),
        (VOIDS + 'vary.mode = ["measure",\n"measures"]\n', '"measures"]', "Did you mean 'measure'"),
        (VOIDS + "options.seed = true\n", "seed", "seed is True: give a whole number"),
        (VOIDS + "vary.alpha = 0.8\n", "vary.alpha", "give a list of values"),
        (VOIDS + 'models = ["modle"]\n', "modle", "Did you mean 'model'"),
        (VOIDS + '[[overrides]]\nmodel = "modle"\nskip = true\n', "modle", "Did you mean 'model'"),
        (VOIDS + '[[overrides]]\nmodel = "model"\n', "[[overrides]]", "changes nothing"),
        (VOIDS + "anlysis = 1\n", "anlysis", "unknown key 'anlysis'. Did you mean 'analysis'"),
        ("[[analysis]]\n", "[[analysis]]", "unknown key 'analysis'. Did you mean 'analyses'"),
        ('[[models]]\nref = "m"\ndtype = "float31"\n', "float31", "Did you mean 'float32'"),
        ('[[prompts]]\nname = "b"\nfile = "no.jsonl"\n' + VOIDS, "no.jsonl", "does not exist"),
        ('[[prompts]]\nname = "b"\n', '[[prompts]]\nname = "b"', "need either file or texts or tokens"),
        (VOIDS + 'options = "x"\n', "options", "is not a table"),
        ("seeds = 3\n", "seeds = 3", "unknown key 'seeds'"),
        (VOIDS + "prompts = []\n", "[[analyses]]", "voids needs prompts"),
        ("[[analyses]]\n", "[[analyses]]", "'analysis' is missing"),
        ("broken =\n", "broken", "not TOML"),
    ],
)
def test_other_faults_name_their_line(refused: Fault, text: str, line: str, message: str) -> None:
    said, path = refused(BASE + text)
    number = (BASE + text)[: (BASE + text).rindex(line)].count("\n") + 1
    assert f"error: {path}:{number}: " in said, said
    assert message in said


def test_a_prompt_line_that_an_analysis_cannot_use(refused: Fault, folder: Path) -> None:
    (folder / "ids.jsonl").write_text('{"tokens": [5, 6]}\n{"tokens": [5, 6], "label": 2}\n')
    said, _ = refused(BASE + '[[analyses]]\nanalysis = "concept_depth"\n')
    assert f"{folder / 'ids.jsonl'}:2: field 'label'" in said


def test_a_folder_that_holds_other_things(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "thesis.tex").touch()
    path = study_file(folder, BASE + VOIDS)
    assert main(["batch", str(path), "--out", str(folder / "out")]) == 2
    assert "not a study" in capsys.readouterr().err

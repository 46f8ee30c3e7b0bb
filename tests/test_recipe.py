from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from flap_export.errors import RecipeError
from flap_export.evidence.methods import resolved
from flap_export.recipe import Recipe, load_recipe, recipe_from
from flap_export.searching import SearchOptions

ROOT = Path(__file__).parents[1]
SMALLEST: dict[str, Any] = {"model": "org/model", "calibrate": {"source": "hf:wikitext:train"}, "prune": {"ratio": 0.2}}


def written(folder: Path, values: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines").glob("*.yaml")), ids=lambda path: path.name)
def test_the_recipes_of_this_repository_are_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert 0 < recipe.prune.ratio < 1


def test_a_section_for_a_search_says_how_to_search() -> None:
    section = recipe_from({**SMALLEST, "search": {"evaluations": 9, "bounds": {3: [0.1, 0.4]}, "seeds": [1, 2]}}).search
    assert section is not None
    assert section.seeds == (1, 2)
    assert section.options == SearchOptions(evaluations=9, bounds={3: (0.1, 0.4)})
    assert recipe_from(SMALLEST).search is None


def test_there_are_recipes() -> None:
    assert ROOT.joinpath("pipelines", "demo.yaml").is_file()


def test_the_smallest_recipe_has_the_papers_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, SMALLEST))
    assert recipe == recipe_from(SMALLEST)
    prune = resolved(recipe.prune)
    assert (prune.metric, prune.structure, prune.compensation) == ("wifv", "al-am", "bias")
    assert recipe.model == "org/model"
    assert recipe.calibrate.samples is None
    assert Recipe.model_validate(recipe.model_dump(by_alias=True)) == recipe


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("prnue", {}, r"unknown key 'prnue'; did you mean 'prune'\?"),
        ("validate_", {}, r"unknown key 'validate_'; did you mean 'validate'\?"),
        ("prune.ration", 0.2, r"unknown key 'prune\.ration'; did you mean 'prune\.ratio'\?"),
        ("calibrate.sample", 3, r"unknown key 'calibrate\.sample'; did you mean 'calibrate\.samples'\?"),
        ("validate.decode_step", 3, r"did you mean 'validate\.decode_steps'\?"),
        ("gates.min_decode_speedup", 3, r"did you mean 'gates\.minimum_decode_speedup'\?"),
        ("search.evaluation", 3, r"unknown key 'search\.evaluation'; did you mean 'search\.evaluations'\?"),
        ("search.seeds", 0, r"'search\.seeds' is 0: input should be a valid tuple"),
        ("model.x", 3, r"needs a section 'model', which is a plain value"),
        ("prune.ratio", "much", r"'prune\.ratio' is 'much': input should be a valid number"),
        ("prune.metric", "wifw", r"'prune\.metric' is 'wifw': input should be 'wifv', 'ifv' or 'wifn'"),
        ("validate.seed", -1, r"'validate\.seed' is -1: input should be greater than or equal to 0"),
        ("calibrate.seed", -1, r"'calibrate\.seed' is -1: input should be greater than or equal to 0"),
        ("prune.seed", 2**63, r"'prune\.seed' is 9\d*: input should be less than or equal to 9"),
        ("search.seeds", [-1], r"'search\.seeds\.0' is -1: input should be greater than or equal to 0"),
        ("calibrate.samples", 0, r"'calibrate\.samples' is 0: input should be greater than 0"),
        ("calibrate.samples", 1.5, r"'calibrate\.samples' is 1\.5: input should be a valid integer"),
        ("device", "tpu", r"'device' is 'tpu': input should be 'cpu' or 'cuda'"),
        ("export", "fp16", r"'export' is 'fp16': input should be a valid dictionary"),
        ("evaluate.sources", "one.txt", r"'evaluate\.sources' is 'one\.txt'"),
        ("model", None, r"'model' is None: input should be a valid string"),
    ],
)
def test_wrong_keys_and_values(key: str, value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(written(tmp_path, SMALLEST), [f"{key}={yaml.safe_dump(value, default_flow_style=True)}"])
    assert "override" in str(caught.value) or "recipe.yaml: " in str(caught.value)


@pytest.mark.parametrize("value", [".inf", ".nan"])
def test_a_gate_is_a_number_that_can_be_breached(value: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"gates\.maximum_perplexity_ratio.*finite"):
        load_recipe(written(tmp_path, SMALLEST), [f"gates.maximum_perplexity_ratio={value}"])


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_from({"modle": "m", "calibrate": {"source": "a"}, "prune": {}}, where="my.yaml")
    for part in ("did you mean 'model'?", "the key 'model' is missing", "'prune' is {}: --ratio must be given"):
        assert part in str(caught.value)
    assert str(caught.value).count("my.yaml: ") == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not a YAML file"),
        ("[" * 5000, "is not a YAML file"),
        ("- a\n- b", r"must hold keys and values.*found list"),
        ("", r"must hold keys and values.*found NoneType"),
        ("just words", r"found str"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(written(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("model: a\nprune:\n  ratio: 0.2\n  method: obs\n  ratio: 0.3\n", "'ratio' stands twice, in lines 3 and 5"),
        ("model: a\nprune: {ratio: 0.2}\nmodel: b\n", "'model' stands twice, in lines 1 and 3"),
        ("prune: {ratio: 0.2, ratio: 0.3}\n", "'ratio' stands twice, in lines 1 and 1"),
    ],
)
def test_a_key_that_stands_twice_is_refused(text: str, lines: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=lines):
        load_recipe(written(tmp_path, text))


def test_a_key_that_stands_twice_in_an_override_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'ratio' stands twice"):
        load_recipe(written(tmp_path, SMALLEST), ["prune={ratio: 0.2, ratio: 0.3}"])


def test_places_without_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no recipe at '.*none\.yaml'"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="is not a YAML file"):
        load_recipe(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="is not a YAML file"):
        load_recipe(tmp_path / "bytes.yaml")


def test_overrides_are_yaml_and_the_last_one_wins(tmp_path: Path) -> None:
    path = written(tmp_path, SMALLEST)
    recipe = load_recipe(
        path,
        [
            "prune.ratio=0.3",
            "prune.ratio = 0.5",
            "export.max_length=64",
            "bench.batch_sizes=[1, 8]",
            "calibrate.source=a=b.txt",
            "gates.minimum_decode_speedup=1.5",
            "calibrate.samples=null",
        ],
    )
    assert recipe.prune.ratio == 0.5
    assert recipe.export.max_length == 64
    assert recipe.bench.batch_sizes == (1, 8)
    assert recipe.calibrate.source == "a=b.txt"
    assert recipe.gates.minimum_decode_speedup == 1.5
    assert recipe.calibrate.samples is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prune.ratio", r"an override reads KEY=VALUE, such as prune\.ratio=0\.3; got 'prune\.ratio'"),
        ("=3", "an override reads KEY=VALUE"),
        ("prune.ratio=[1", r"the value of the override 'prune\.ratio=\[1' is not YAML"),
        ("prune.ratio.x=1", r"needs a section 'ratio', which is a plain value"),
    ],
)
def test_overrides_that_cannot_be_read(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(written(tmp_path, SMALLEST), [override])


def test_files_beside_the_recipe_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from elsewhere; what does not lie there stays as it is: a hub name, or a path from where one works."""
    folder = tmp_path / "pipelines"
    (folder / "demo").mkdir(parents=True)
    for name in ("demo/model", "calibration.txt", "test.txt"):
        (folder / name).touch()
    values = {
        "model": "demo/model",
        "calibrate": {"source": "calibration.txt"},
        "prune": {"ratio": 0.2},
        "evaluate": {"sources": ["test.txt", "hf:wikitext:test", "other.txt"]},
    }
    recipe = load_recipe(written(folder, values))
    assert recipe.model == str(folder / "demo" / "model")
    assert recipe.calibrate.source == str(folder / "calibration.txt")
    assert recipe.evaluate.sources == (str(folder / "test.txt"), "hf:wikitext:test", "other.txt")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("pipelines/recipe.yaml").model == "pipelines/demo/model"


def test_rates_are_a_file_beside_the_recipe_or_a_list(tmp_path: Path) -> None:
    """The rates themselves become part of the recipe, so that what they were is kept with a run."""
    folder = tmp_path / "pipelines"
    folder.mkdir()
    (folder / "rates.json").write_text("[0.1, 0.3]")
    by_file, by_list = (
        load_recipe(written(folder, {**SMALLEST, "prune": {"method": "obs", "rates": rates}}))
        for rates in ("rates.json", [0.1, 0.3])
    )
    assert by_file == by_list
    assert by_file.prune.ratio is None
    assert [rate.rate for rate in by_file.prune.rates or ()] == [0.1, 0.3]
    assert Recipe.model_validate_json(by_file.model_dump_json(by_alias=True)) == by_file
    override = f"prune.rates={folder / 'rates.json'}"
    assert load_recipe(written(tmp_path, SMALLEST), [override]).prune.rates == by_file.prune.rates


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ("none.json", r"recipe\.yaml: 'prune\.rates': no file of rates at 'none\.json'"),
        ("bad.json", r"recipe\.yaml: 'prune\.rates': .*layers\.1\.rate is 3"),
        ([0.1, 3], r"recipe\.yaml: 'prune\.rates\.1\.rate' is 3: input should be less than or equal to 1"),
        (0.3, r"recipe\.yaml: 'prune\.rates' is 0\.3"),
    ],
)
def test_rates_that_cannot_be_used(rates: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("[0.1, 3]")
    with pytest.raises(RecipeError, match=message):
        load_recipe(written(tmp_path, {**SMALLEST, "prune": {"rates": rates}}))


def test_a_recipe_is_frozen() -> None:
    recipe = recipe_from(SMALLEST)
    with pytest.raises(ValueError, match="frozen"):
        recipe.prune.ratio = 0.5  # type: ignore[misc]

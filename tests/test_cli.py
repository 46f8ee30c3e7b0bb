from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
import transformers
from tiny import save_tokens, tiny_checkpoint, tiny_pruned, tokens_of
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from flap_export.cli import main
from flap_export.cli.app import app
from flap_export.errors import GateBreachedError, MissingRequirementError, ModelError
from flap_export.manifest import write_manifest
from flap_export.models.loading import load_model
from flap_export.runners import open_runner
from flap_export.text.tokenization import load_tokenizer


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Call = Callable[..., Outcome]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Run the command line in this process, as the installed script would."""

    def run(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["flap-export", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = capfd.readouterr()
        code = exit_.value.code
        return Outcome(code if isinstance(code, int) else 0, out, err)

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cli") / "model"
    tiny_checkpoint("llama", directory, vocab_size=300)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the cat sat on the mat " * 20], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    (directory.parent / "text.txt").write_text("the cat sat on the mat and looked at the other cat. " * 40)
    return directory


@pytest.fixture(scope="module")
def pruned(model: Path) -> Path:
    import flap_export

    output = model.parent / "pruned"
    flap_export.prune(model, output, ratio=0.3, calibration=str(model.parent / "text.txt"), sequence_length=16)
    return output


@pytest.fixture(scope="module")
def artifacts(model: Path, pruned: Path) -> tuple[Path, Path]:
    import flap_export

    paths = (model.parent / "dense-onnx", model.parent / "pruned-onnx")
    for source, output in zip((model, pruned), paths, strict=True):
        flap_export.export(source, output, max_length=48)
    return paths


def test_prune_prints_the_plan_as_json_and_nothing_else(call: Call, model: Path, tmp_path: Path) -> None:
    text = model.parent / "text.txt"
    options = ("--ratio", "0.25", "--calibration", text, "--sequence-length", "16", "--json")
    outcome = call("prune", model, "--output", tmp_path / "out", *options)
    assert outcome.code == 0
    plan = json.loads(outcome.out)
    assert plan == json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["schema_version"] == 1
    assert set(plan["layers"][0]) == {"layer", "query_heads", "kv_heads", "ffn_channels"}
    assert abs(plan["ratio"]["achieved"] - 0.25) < 0.01
    assert plan["digests"].keys() >= {"weights", "calibration"}


def test_heads_that_a_structure_does_not_remove_are_told(call: Call, model: Path, tmp_path: Path) -> None:
    arguments = ("prune", model, "-o", tmp_path / "pruned", "--ratio", "0.2", "--method", "random", "--json")
    outcome = call(*arguments, "--remove-heads", "2")
    assert outcome.code == 0
    assert "--remove-heads is not used: the structure is ul-um" in outcome.err
    assert json.loads(outcome.out)["method"]["unused"] == "remove_heads"
    outcome = call(*arguments)
    assert "not used" not in outcome.err
    assert "unused" not in json.loads(outcome.out)["method"]


@pytest.mark.parametrize("method", ["flap", "magnitude"])
def test_an_alignment_above_the_width_is_refused(call: Call, model: Path, tmp_path: Path, method: str) -> None:
    arguments = (
        "--ratio",
        "0.2",
        "--calibration",
        model.parent / "text.txt",
        "--sequence-length",
        "16",
        "--method",
        method,
    )
    outcome = call("prune", model, "-o", tmp_path / "pruned", *arguments, "--align-channels", "1000")
    assert outcome.code == 2
    assert "--align-channels must be at most" in outcome.err
    assert not (tmp_path / "pruned").exists()


def test_prune_takes_rates_in_place_of_a_ratio(call: Call, model: Path, tmp_path: Path) -> None:
    (tmp_path / "rates.json").write_text("[0.3, 0.1]")
    options = ("--calibration", model.parent / "text.txt", "--sequence-length", "16", "--json")
    outcome = call("prune", model, "--output", tmp_path / "out", "--rates", tmp_path / "rates.json", *options)
    assert outcome.code == 0
    plan = json.loads(outcome.out)
    assert abs(plan["ratio"]["achieved"] - 0.2) < 0.01
    assert len(plan["layers"][0]["ffn_channels"]) < len(plan["layers"][1]["ffn_channels"])


def test_validate_bench_evaluate_and_generate(
    call: Call, model: Path, pruned: Path, artifacts: tuple[Path, Path], tmp_path: Path
) -> None:
    dense_onnx, pruned_onnx = artifacts
    parity = call("validate", pruned_onnx, "--reference", pruned, "--decode-steps", "4", "--json")
    assert parity.code == 0
    found = json.loads(parity.out)
    assert found["passed"] is True
    assert {comparison["phase"] for comparison in found["comparisons"]} == {"prefill", "decode"}
    short = ("--prompt-length", "8", "--repeats", "3", "--budget", "1")
    bench = call("bench", pruned_onnx, "--baseline", dense_onnx, *short, "--json")
    assert bench.code == 0
    assert {"speedup", "ideal_speedup", "efficiency"} <= set(json.loads(bench.out)["phases"][0])
    text = model.parent / "text.txt"
    for target in (pruned, pruned_onnx):
        quality = json.loads(call("evaluate", target, "--text", text, "--sequence-length", "16", "--json").out)
        assert quality["sources"][0]["contaminated"] is True
        assert quality["sources"][0]["perplexity"] > 1
    prompt = ("--prompt", "the cat", "--max-new-tokens", "6")
    written = [call("generate", target, *prompt, "--json") for target in (pruned, pruned_onnx)]
    assert [outcome.code for outcome in written] == [0, 0]
    assert json.loads(written[0].out)["text"] == json.loads(written[1].out)["text"] != ""
    shown = call("generate", pruned_onnx, *prompt)
    assert shown.out == json.loads(written[1].out)["text"] + "\n"


def test_a_parity_breach_exits_1_and_names_the_gate(
    call: Call, model: Path, artifacts: tuple[Path, Path], pruned: Path, tmp_path: Path
) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(artifacts[1], broken)
    content = bytearray((broken / "model.onnx.data").read_bytes())
    content[3] ^= 0x40
    (broken / "model.onnx.data").write_bytes(content)
    # Written so, as by a wrong export: the manifest says nothing against it.
    write_manifest(broken, digests={})
    outcome = call("validate", broken, "--reference", pruned, "--decode-steps", "4", "--json")
    assert outcome.code == 1
    assert json.loads(outcome.out)["passed"] is False
    assert "parity" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_speedup_gate_exits_1(call: Call, artifacts: tuple[Path, Path]) -> None:
    options = ("--prompt-length", "8", "--repeats", "3", "--budget", "1", "--minimum-speedup", "1000")
    outcome = call("bench", artifacts[1], "--baseline", artifacts[0], *options)
    assert outcome.code == 1
    assert "speedup" in outcome.err


def test_inspect_tells_of_heads_that_only_a_norm_needs(call: Call, tmp_path: Path) -> None:
    tiny_pruned("olmo2", tmp_path)
    dense, pruned = (
        [line.split() for line in call("inspect", tmp_path / name).out.splitlines() if line[:1].isdigit()]
        for name in ("dense", "pruned")
    )
    assert dense == [["0-3", "4", "2", "40"]]
    assert pruned[1] == ["1", "1", "(4", "projected)", "1", "(2", "keys", "projected)", "13"]
    assert pruned[3] == ["3", "0", "0", "0"]


@pytest.mark.parametrize("which", ["model", "pruned", "artifact"])
def test_inspect(call: Call, model: Path, pruned: Path, artifacts: tuple[Path, Path], which: str) -> None:
    path = {"model": model, "pruned": pruned, "artifact": artifacts[1]}[which]
    value = json.loads(call("inspect", path, "--json").out)
    assert len(value["shape"]["layers"]) == 2
    assert "layer" in call("inspect", path).out
    if which != "artifact":
        loaded = load_model(path, dtype=torch.float32)
        assert value["parameters"] == sum(parameter.numel() for parameter in loaded.parameters())


def test_verify(call: Call, artifacts: tuple[Path, Path], tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(artifacts[0], copy)
    assert call("verify", copy).code == 0
    (copy / "model.onnx").write_bytes(b"broken")
    outcome = call("verify", copy)
    assert outcome.code == 2
    assert "model.onnx is changed" in outcome.err


def test_verify_holds_after_what_is_written_into_a_directory(
    call: Call, pruned: Path, artifacts: tuple[Path, Path], tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(artifacts[1], copy)
    parity = ("validate", copy, "--reference", pruned, "--decode-steps", "2")
    bench = ("bench", copy, "--baseline", artifacts[0], "--repeats", "3", "--budget", "1", "--prompt-length", "4")
    for command, name in ((parity, "parity.json"), (parity, "by-another-name.json"), (bench, "latency.json")):
        assert call(*command, "--output", copy / name).code == 0
        assert call("verify", copy).code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "MODEL", "--output", "OUT", "--ratio", "1", "--calibration", "TEXT"], "strictly between 0 and 1"),
        (["prune", "MODEL", "--output", "OUT", "--ratio", "nan", "--calibration", "TEXT"], "strictly between 0 and 1"),
        (["prune", "MODEL", "--output", "OUT", "--ratio", "0.2", "--calibration", "no.txt"], "no text source"),
        (["prune", "MODEL", "--output", "OUT", "--ratio", "0.2", "--calibration", "TEXT", "--samples", "9999"], "9999"),
        (["prune", "MODEL", "--output", "OUT", "--ratio", "0.2", "--calibration", "TEXT", "--metric", "x"], "wifv"),
        (["prune", "MODEL", "--output", "OUT", "--calibration", "TEXT"], "--ratio must be given, or --rates"),
        (["prune", "MODEL", "--output", "OUT", "--rates", "no.json", "--calibration", "TEXT"], "no file of rates"),
        (["prune", "nowhere", "--output", "OUT", "--ratio", "0.2", "--calibration", "TEXT"], "no model directory"),
        (["prune", "PRUNED", "--output", "OUT", "--ratio", "0.2", "--calibration", "TEXT"], "pruned already"),
        (["export", "MODEL", "--output", "OUT", "--dtype", "int3"], "float32"),
        (["export", "MODEL", "--output", "OUT", "--max-length", "100000"], "positions"),
        (["export", "MODEL", "--output", "MODEL"], "holds something else"),
        (["validate", "MODEL", "--reference", "MODEL"], "no exported artifact"),
        (["bench", "MODEL", "--baseline", "MODEL"], "no exported artifact"),
        (["evaluate", "MODEL", "--text", "no.npy"], "no text source"),
        (["generate", "nowhere", "--prompt", "x"], "no model directory"),
        (["report", "MODEL"], ""),
        (["run", "no.yaml"], "no recipe"),
        (["inspect", "nowhere"], "no model directory"),
        (["verify", "MODEL"], "manifest"),
    ],
)
def test_wrong_input_exits_2_with_one_clear_line(
    call: Call, model: Path, pruned: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    names = {"MODEL": model, "PRUNED": pruned, "OUT": tmp_path / "out", "TEXT": model.parent / "text.txt"}
    outcome = call(*(names.get(argument, argument) for argument in arguments))
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.startswith("error: ")
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    assert not (tmp_path / "out").exists()


def test_an_error_with_json_is_one_json_object(call: Call, tmp_path: Path) -> None:
    outcome = call("inspect", tmp_path / "none", "--json")
    assert json.loads(outcome.out)["error"]["exit_code"] == 2
    assert json.loads(outcome.out)["error"]["kind"] == "Model"


def test_what_nobody_foresaw_is_not_taken_for_a_breached_gate(
    call: Call, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("flap_export.exporting.export", failing)
    outcome = call("export", model, "--output", "nowhere", "--json")
    assert outcome.code == 70
    assert "Traceback" in outcome.err
    assert f"transformers {transformers.__version__}" in outcome.err
    told = {"kind": "Unforeseen", "message": "ZeroDivisionError: a defect", "exit_code": 70}
    assert json.loads(outcome.out) == {"error": told}


@pytest.mark.parametrize("settings", ["{bad", "[]", '{"eos_token_id": 1.5}'])
def test_generation_settings_that_cannot_be_read(
    call: Call, artifacts: tuple[Path, Path], settings: str, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(artifacts[0], damaged)
    (damaged / "generation_config.json").write_text(settings)
    outcome = call("generate", damaged, "--prompt", "the")
    assert outcome.code == 2
    assert "eos_token_id" in outcome.err


@pytest.mark.parametrize("error", [RuntimeError("while tracing"), ModelError("no model"), SystemExit(1), None], ids=str)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_whatever_becomes_of_it(
    number: signal.Signals, error: BaseException | None, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: str) -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except BaseException:
            if error is None:
                raise
            raise error from None

    monkeypatch.setattr("flap_export.cli.inspecting.described", interrupted)
    # Whatever a test before this one, or the shell (nohup), made of them.
    before = {each: signal.signal(each, signal.SIG_DFL) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        outcome = call("inspect", "model", "--json")
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert outcome.code == 128 + number
    assert outcome.out == ""
    assert "Traceback" not in outcome.err


def test_a_path_is_printed_as_it_is(call: Call, pruned: Path, tmp_path: Path) -> None:
    """Rich reads square brackets as markup."""
    output = tmp_path / "[red]" / "x[" / "y]"
    output.parent.mkdir(parents=True)
    outcome = call("export", pruned, "--output", output, "--max-length", "8")
    assert outcome.code == 0
    assert outcome.out.endswith(f"{output}\n")


def test_help_names_every_option_on_a_narrow_terminal(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = call("prune", "--help").out
    assert {"--square-attention", "--align-channels", "--sequence-length"} <= set(shown.split())
    assert "..." not in call("--help").out.partition("Commands:")[2]


REQUIRED = {
    "prune": ["m", "-o", "x"],
    "validate": ["a", "--reference", "m"],
    "generate": ["m", "--prompt", "a"],
    "bench": ["a", "--baseline", "b"],
    "compare": ["m", "-o", "x", "--calibration", "t", "--text", "t"],
    "search": ["m", "-o", "x", "--ratio", "0.2", "--calibration", "t"],
    "predict": ["p", "--gpu", "l4"],
}
"""Arguments without which a command says only that they are missing."""


def options_of_numbers() -> Iterator[tuple[str, str]]:
    for command in app.registered_commands:
        assert command.callback is not None
        for name, hint in get_type_hints(command.callback).items():
            if float in (hint, *get_args(hint), *(inner for part in get_args(hint) for inner in get_args(part))):
                yield command.callback.__name__, f"--{name.replace('_', '-')}"


def test_options_of_numbers_are_found() -> None:
    assert {("bench", "--minimum-speedup"), ("compare", "--ratio"), ("predict", "--kernel-gap-us")} <= set(
        options_of_numbers()
    )


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize(("command", "option"), list(options_of_numbers()))
def test_no_option_takes_what_is_no_number(call: Call, command: str, option: str, value: str) -> None:
    outcome = call(command, *REQUIRED[command], option, value)
    assert outcome.code == 2
    assert f"Invalid value for '{option}'" in outcome.err or "must lie strictly between 0 and 1" in outcome.err


@pytest.mark.parametrize("value", ["0", "-3", "1.5"])
@pytest.mark.parametrize("name", ["--bandwidth-efficiency", "--matrix-efficiency"])
def test_assumed_shares_are_shares(call: Call, pruned: Path, name: str, value: str) -> None:
    outcome = call("predict", pruned, "--gpu", "l4", name, value)
    assert outcome.code == 2
    assert f"Invalid value for '{name}'" in outcome.err
    assert call("predict", "--help").out.count("0.01<=x<=1.0") == 2


@pytest.mark.parametrize("command", sorted(set(REQUIRED) - {"predict"}))
def test_seeds_are_not_negative(call: Call, command: str) -> None:
    outcome = call(command, *REQUIRED[command], "--seed", "-1")
    assert outcome.code == 2
    assert "Invalid value for '--seed'" in outcome.err


def test_wrong_usage_exits_2(call: Call) -> None:
    assert call("prune").code == 2
    assert call("no-such-command").code == 2


@pytest.mark.parametrize("arguments", [["prune"], ["verify", "x", "--nonsense"], ["bench", "x", "--budget", "soon"]])
def test_wrong_usage_with_json_is_one_json_object(call: Call, arguments: list[str]) -> None:
    outcome = call(*arguments, "--json")
    assert outcome.code == 2
    found = json.loads(outcome.out)["error"]
    assert found["kind"] == "Usage"
    assert found["exit_code"] == 2
    assert found["message"]


def test_what_the_operating_system_refuses_is_one_line(call: Call, model: Path) -> None:
    outcome = call("export", model, "--output", "x" * 1000)
    assert outcome.code == 2
    assert outcome.err.startswith("error: 'xxx")
    assert "File name too long" in outcome.err


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_standard_output_that_fails_is_no_breached_gate(model: Path, form: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "flap_export", "inspect", str(model), *form]
    reader, writer = os.pipe()
    os.close(reader)
    gone = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (gone.returncode, gone.stderr) == (141, "")
    with Path("/dev/full").open("w") as full:
        refused = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr == "error: No space left on device\n"
    closed = ["bash", "-c", '"$@" >&-', "-", *command]
    assert subprocess.run(closed, stderr=subprocess.PIPE, text=True, check=False).stderr == ""


def test_damaged_generation_settings_are_named(call: Call, artifacts: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(artifacts[1], tmp_path / "onnx")
    for text in ("[]", "{", '{"eos_token_id": 1.5}', '{"eos_token_id": ["x"]}'):
        (tmp_path / "onnx" / "generation_config.json").write_text(text)
        outcome = call("generate", tmp_path / "onnx", "--prompt", "the")
        assert outcome.code == 2
        assert "generation_config.json' is damaged" in outcome.err
    (tmp_path / "onnx" / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert call("generate", tmp_path / "onnx", "--prompt", "the", "--max-new-tokens", "2").code == 0


def test_without_generation_settings_the_configuration_says_where_texts_end(
    call: Call, model: Path, tmp_path: Path
) -> None:
    """As transformers has it; an artifact has no configuration, and gets settings of its own."""
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    (bare / "generation_config.json").unlink()
    with open_runner(bare) as runner:
        first = int(runner.prefill([load_tokenizer(bare, 300).encode("the cat")])[0].argmax())
    for end in ([1, first], None):
        config = {**json.loads((bare / "config.json").read_text()), "eos_token_id": end}
        (bare / "config.json").write_text(json.dumps(config))
        assert AutoModelForCausalLM.from_pretrained(bare).generation_config.eos_token_id == end
        assert call("export", bare, "--output", tmp_path / "onnx", "--max-length", "16").code == 0
        assert (tmp_path / "onnx" / "generation_config.json").is_file() == (end is not None)
        for target in (bare, tmp_path / "onnx"):
            outcome = call("generate", target, "--prompt", "the cat", "--max-new-tokens", "3", "--json")
            assert bool(json.loads(outcome.out)["text"]) == (end is None)


def test_names_are_printed_as_they_are(call: Call, model: Path, tmp_path: Path) -> None:
    assert "hf::train" in call("evaluate", model, "--text", "hf::train").err
    assert "hf:x:train:" in call("evaluate", model, "--text", "hf:x:train:").err
    output = tmp_path / "out[" / "x]"
    assert f"{output}" in call("export", model, "--output", output, "--max-length", "16").out


@pytest.mark.parametrize("name", ["", "gpu", "cuda:x", "meta", "[bold]"])
@pytest.mark.parametrize("method", ["flap", "magnitude"])
def test_a_device_that_is_none(call: Call, model: Path, tmp_path: Path, name: str, method: str) -> None:
    text = model.parent / "text.txt"
    options = ("--ratio", "0.2", "--calibration", text, "--method", method, "--device", name)
    outcome = call("prune", model, "--output", tmp_path / "out", *options)
    assert outcome.code == 2
    assert "device must be cpu, cuda or cuda:N" in outcome.err


def test_a_result_never_replaces_a_file_of_another_kind(
    call: Call, pruned: Path, artifacts: tuple[Path, Path], tmp_path: Path
) -> None:
    dense, exported = artifacts
    other = tmp_path / "other.json"
    other.write_text("mine")
    for command in (["validate", exported, "--reference", pruned], ["bench", exported, "--baseline", dense]):
        for output in (other, tmp_path, Path("/")):
            outcome = call(*command, "--output", output)
            assert outcome.code == 2
            assert f"the output '{output}' is a" in outcome.err
    assert other.read_text() == "mine"


def test_an_unknown_recipe_key_names_the_nearest(call: Call, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: m\ncalibrate: {source: t.txt}\nprune: {ration: 0.2}\n")
    outcome = call("run", tmp_path / "r.yaml")
    assert outcome.code == 2
    assert "did you mean 'prune.ratio'" in outcome.err


@pytest.mark.parametrize(
    ("error", "code"), [(MissingRequirementError("no GPU", "buy one"), 3), (GateBreachedError("parity", "off"), 1)]
)
def test_exit_codes_of_errors(
    call: Call, monkeypatch: pytest.MonkeyPatch, model: Path, error: Exception, code: int
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("flap_export.exporting.export", failing)
    outcome = call("export", model, "--output", "nowhere")
    assert outcome.code == code
    assert str(error) in outcome.err


def test_run_from_a_recipe(call: Call, model: Path, tmp_path: Path) -> None:
    source = save_tokens(tmp_path / "tokens.npy", tokens_of(6, 12))
    (tmp_path / "tiny.yaml").write_text(
        f"model: {model}\ncalibrate: {{source: {source}}}\nprune: {{ratio: 0.2}}\nexport: {{max_length: 48}}\n"
        "validate: {decode_steps: 4, prompt_length: 8}\nbench: {repeats: 3, prompt_lengths: [8], budget_s: 1}\n"
    )
    outcome = call("run", tmp_path / "tiny.yaml", "--output", tmp_path / "run", "--set", "prune.ratio=0.3", "--json")
    assert outcome.code == 0
    value = json.loads(outcome.out)
    assert value["passed"] is True
    assert value["ratio"]["requested"] == 0.3
    assert Path(value["report"]).is_file()

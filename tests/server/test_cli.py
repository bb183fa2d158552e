"""The `nvfp4` command without starting anything heavy."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
from fastapi import FastAPI

from nvfp4_runtime import __version__
from nvfp4_runtime.engine.messages import LayerGroup
from nvfp4_runtime.errors import CheckpointError, ConfigError, EngineDeadError, KernelError
from nvfp4_runtime.kernels.cpu.backend import physical_cores, supported_isas
from server.cli import _parser, exit_code, main
from server.commands.flags import size as parse_bytes
from server.config import hash_key, read_api_keys, warn_of_unknown
from server.configs import engine_config, server_config
from server.model_source import default_model, resolve_model, sampling_defaults
from server.screen import backend_line, layer_lines, op_lines, ready_screen
from server.serve import _make_server, bind
from tests.fakes import fake_info
from tests.server.conftest import TEXT

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MiB", 512 << 20), ("2G", 2 << 30), ("2gb", 2 << 30), ("1073741824", 1 << 30), ("1.5K", 1536)],
)  # fmt: skip
def test_sizes_are_powers_of_1024(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1G", "0", "GiB", "nan", "inf", "1e400", "5Q"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="2GiB"):
        parse_bytes(text)


def test_exit_codes_tell_configuration_load_and_engine_death_apart() -> None:
    assert exit_code(ConfigError("x")) == 1
    assert exit_code(CheckpointError("x")) == exit_code(KernelError("x")) == 2
    assert exit_code(EngineDeadError("x")) == 3


def test_version_names_torch_and_kernels_without_importing_torch() -> None:
    script = (
        "import sys; from server.cli import main; code = main(['version']); print('torch' in sys.modules); exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == f"nvfp4 {__version__}"
    assert any(line.startswith("torch 2.") for line in lines)
    (kernels,) = (line for line in lines if line.startswith("backend cpu: "))
    if isas := supported_isas():
        threads = physical_cores()
        words = f"{threads} thread{'s' * (threads > 1)} unless --threads is given"
        assert kernels == f"backend cpu: built, runs {isas[0]} (of {', '.join(isas)}) on {words}"
    assert lines[-1] == "False"


def test_errors_are_one_line_that_names_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--simulate", "--port", "70000"]) == 1
    assert capsys.readouterr().err == "nvfp4: the port must be between 0 and 65535, found 70000 [--port]\n"


@pytest.mark.parametrize("flag", ["--simulate-step-seconds=1", "--simulate-script=x"])
def test_flags_of_the_simulation_need_it(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "0", flag]) == 1
    name = flag.partition("=")[0]
    assert capsys.readouterr().err == f"nvfp4: {name} says how to simulate; it needs --simulate\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--port", "x"],
        ["serve", "--seed", str(10**23)],
        ["serve", "--numerics", "w8a8"],
        ["serve", "--nope"],
        ["nope"],
        [],
        ["quantize", "a"],
    ],
)
def test_wrong_flags_are_configuration_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert message.startswith("nvfp4: ")
    assert message.endswith("--help)\n")
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "a\0b"],
        ["serve", "--api-key-file", "a\0b"],
        ["quantize", "a\0b", "out"],
        ["quantize", "a", "a\0b"],
        ["eval", "default", "--text", "a\0b"],
        ["distill", "a\0b", "out", "--data", "c"],
        ["distill", "a", "a\0b", "--data", "c"],
        ["distill", "a", "out", "--data", "a\0b"],
        ["inspect", "a\0b"],
        ["inspect", "a", "--parent", "a\0b"],
        ["inspect", "a", "--repair", "a\0b"],
    ],
)
def test_a_path_with_a_nul_is_a_configuration_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    assert r"expected a path, found 'a\x00b', which holds a NUL" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["auto", "bf16", "fp8", "nvfp4"])
def test_the_heads_type_reaches_the_engine(dtype: str) -> None:
    args = _parser()[0].parse_args(["serve", "model", "--lm-head-dtype", dtype])
    assert engine_config(args, "model").lm_head_dtype == dtype


def test_key_file_holds_one_key_per_line(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("one\n\n  two  \n")
    assert read_api_keys(path) == (hash_key("one"), hash_key("two"))
    path.write_text("\n")
    with pytest.raises(ConfigError, match="holds no key"):
        read_api_keys(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_api_keys(tmp_path / "nowhere")


@pytest.mark.parametrize("value", ["maybe", "2"])
def test_switches_in_the_environment_are_0_or_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    monkeypatch.setenv("NVFP4_SIMULATE", value)
    assert main(["serve", "/nowhere"]) == 1
    assert "NVFP4_SIMULATE must be 0 or 1" in capsys.readouterr().err


def test_folder_is_taken_as_it_is_and_nothing_is_fetched_unasked(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path), allow_download=False) == tmp_path
    with pytest.raises(ConfigError, match="--allow-download"):
        resolve_model("org/name", allow_download=False)


def test_sampling_defaults_come_from_the_generation_config(tmp_path: Path) -> None:
    declared = '{"temperature": 0.6, "top_k": 20, "max_new_tokens": 99, "do_sample": true, "top_p": null}'
    (tmp_path / "generation_config.json").write_text(declared)
    auto = argparse.Namespace(generation_config="auto")
    assert sampling_defaults(tmp_path, auto) == {"temperature": 0.6, "top_k": 20, "max_tokens": 99}
    assert sampling_defaults(tmp_path, argparse.Namespace(generation_config="none")) == {}


@pytest.mark.parametrize(("found", "expected"), [("50.0", 50), ("-1", -1)])
def test_whole_sampling_default_is_an_integer_however_it_is_written(tmp_path: Path, found: str, expected: int) -> None:
    (tmp_path / "generation_config.json").write_text(f'{{"top_k": {found}, "temperature": 1}}')
    defaults = sampling_defaults(tmp_path, argparse.Namespace(generation_config="auto"))
    assert defaults == {"top_k": expected, "temperature": 1.0}
    assert [type(value) for value in defaults.values()] == [float, int], "the engine's messages are typed"


@pytest.mark.parametrize(
    ("name", "value"),
    [("top_k", "true"), ("top_k", "50.5"), ("top_k", '"50"'), ("top_k", "-2"), ("top_k", "NaN"), ("top_k", "1e400"),
     ("top_k", "1e30"), ("top_p", "0.0"), ("top_p", "[1]"), ("temperature", "false"), ("temperature", "2.5"),
     ("temperature", "NaN"), ("min_p", "-0.1"), ("repetition_penalty", "0"), ("max_new_tokens", "0"),
     ("max_new_tokens", "9.5")],
)  # fmt: skip
def test_unusable_sampling_default_ends_the_start_and_names_file_field_and_remedy(
    tmp_path: Path, name: str, value: str
) -> None:
    (tmp_path / "generation_config.json").write_text(f'{{"{name}": {value}}}')
    with pytest.raises(ConfigError, match=rf"generation_config\.json: {name}: .*--generation-config none"):
        sampling_defaults(tmp_path, argparse.Namespace(generation_config="auto"))


def test_port_that_another_start_holds_is_refused_at_once() -> None:
    with bind("127.0.0.1", 0) as first, pytest.raises(ConfigError, match="--port") as refused:
        bind("127.0.0.1", first.getsockname()[1])
    assert refused.value.flag == "--port"


def test_working_directory_cannot_shadow_the_process_that_prepares_the_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "server.py").write_text("raise SystemExit('shadowed')")
    commands: list[list[str]] = []

    def note(command: list[str], **options: object) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 7)

    with monkeypatch.context() as patch:
        patch.setattr("nvfp4_runtime.quantize.default_model.cached_default_model", lambda: None)
        patch.setattr("server.model_source.subprocess.run", note)
        with pytest.raises(SystemExit) as ended:
            default_model()
    assert ended.value.code == 7
    (command,) = commands
    assert command[-1] == "prepare"
    assert "-P" in command, "an editable install may come before the working directory and hide its lack below"
    version = subprocess.run([*command[:-1], "version"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert version.stdout.startswith(f"nvfp4 {__version__}"), version.stderr


@pytest.mark.parametrize(
    ("flags", "names"), [([], ["env"]), (["--served-model-name=a", "--served-model-name", "b"], ["a", "b"])]
)
def test_repeatable_flag_of_the_command_line_replaces_the_environments(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], names: list[str]
) -> None:
    found: list[argparse.Namespace] = []

    def note(args: argparse.Namespace) -> int:
        found.append(args)
        return 0

    monkeypatch.setattr("server.serve.serve", note)
    monkeypatch.setenv("NVFP4_SERVED_MODEL_NAME", "env")
    assert main(["serve", *flags]) == 0
    assert found[0].served_model_name == names


def serve_arguments(*flags: str) -> argparse.Namespace:
    from server.cli import _parser

    return _parser()[0].parse_args(["serve", *flags])


@pytest.mark.parametrize(("given", "seconds"), [("0", 0), ("0.2", 1), ("30", 30)])
def test_shutdown_timeout_of_0_is_0_and_parts_of_seconds_round_up(given: str, seconds: int) -> None:
    config = server_config(serve_arguments("--shutdown-timeout", given), "m")
    assert _make_server(FastAPI(), config).config.timeout_graceful_shutdown == seconds


@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
def test_shutdown_timeout_that_is_no_time_is_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--simulate", "--port", "0", f"--shutdown-timeout={value}"]) == 1
    assert "[--shutdown-timeout]" in capsys.readouterr().err


def test_flags_of_the_api_reach_the_server() -> None:
    flags = ["--trust-request-chat-template", "--enable-tokenizer-info-endpoint", "--embedding-pooling", "mean"]
    flags += ["--response-store-memory", "1MiB", "--response-store-ttl", "5"]
    config, plain = server_config(serve_arguments(*flags), "m"), server_config(serve_arguments(), "m")
    assert (config.trust_request_chat_template, plain.trust_request_chat_template) == (True, False)
    assert (config.enable_tokenizer_info, plain.enable_tokenizer_info) == (True, False)
    assert (config.pooling, plain.pooling) == ("mean", "last")
    assert (config.stored_responses_bytes, config.stored_responses_seconds) == (1 << 20, 5.0)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_response_ttl_that_is_no_time_is_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--simulate", "--port", "0", f"--response-store-ttl={value}"]) == 1
    assert "[--response-store-ttl]" in capsys.readouterr().err


def test_zero_as_context_length_is_not_taken_for_the_default() -> None:
    config = engine_config(serve_arguments("--simulate", "--max-model-len", "0"), "")
    assert config.simulated is not None
    assert config.simulated.max_model_len == 0, "the engine refuses it, naming the flag"


def test_types_that_no_backend_computes_in_are_not_offered(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--dtype", "float16"]) == 1
    assert "float16" in capsys.readouterr().err


def test_start_up_screen_fits_one_screen_and_names_kernels_with_reasons() -> None:
    from server.config import ServerConfig

    screen = ready_screen(fake_info(), ServerConfig(served_model_names=("tiny",)), "http://127.0.0.1:8000")
    assert len(screen.splitlines()) <= 24
    assert "2 x qkv_proj" in screen
    assert "nvfp4 4.50 bit" in screen
    assert "reference dense  (cpu: not built)" in screen
    assert "\n  backends  cpu (avx2, 2 threads); reference (AVX512, 4 threads)\n" in screen
    assert "\n  other ops norm, rope: cpu\n            attention: reference  (cpu: D=80 is not built)\n" in screen
    assert "1024 tokens fit (4.0 requests of full length)" in screen
    assert "w4a16 (auto: what cpu runs fastest)" in screen
    assert "\n  device    cpu\n" in screen


def test_flags_of_the_device_reach_the_engine() -> None:
    config = engine_config(serve_arguments("--device", "cuda", "--gpu-memory-utilization", "0.5"), "model")
    assert (config.device, config.cuda_graphs, config.cache.gpu_memory_utilization) == ("cuda", True, 0.5)
    config = engine_config(serve_arguments("--no-cuda-graphs"), "model")
    assert (config.device, config.cuda_graphs, config.cache.gpu_memory_utilization) == ("auto", False, 0.9)


def test_ops_that_one_backend_runs_share_a_line_and_a_backend_that_cannot_run_says_why() -> None:
    ops = [LayerGroup(name, 1, "-", 0.0, 0, "reference", "float32") for name in ("norm", "rope", "attention")]
    info = fake_info(layers=ops, backends={"cpu": {"status": "extension not built"}, "reference": {"isa": "AVX2"}})
    assert op_lines(info) == ["norm, rope, attention: reference"]
    assert layer_lines(info) == []
    assert backend_line(info) == "cpu (extension not built); reference (AVX2)"


def test_simulated_vocabulary_is_the_tokenizers() -> None:
    config = engine_config(serve_arguments("--simulate", "--simulate-script", "Hé", "--num-kv-blocks", "9"), "")
    assert config.simulated is not None
    assert config.simulated.vocab_size == TEXT.tokenizer.vocab_size == 259
    assert config.simulated.script == tuple("Hé".encode())
    assert config.cache.num_blocks == 9


@pytest.mark.parametrize(
    ("word", "kv_dtype"),
    [("bf16", "bfloat16"), ("bfloat16", "bfloat16"), ("float32", "float32"), ("fp8", "fp8"), ("nvfp4", "nvfp4")],
)
def test_every_cache_type_has_its_word_and_bf16_two(word: str, kv_dtype: str) -> None:
    assert serve_arguments("m", "--kv-cache-dtype", word).kv_cache_dtype == kv_dtype


def test_an_unknown_cache_type_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="nvfp4"):
        serve_arguments("m", "--kv-cache-dtype", "int4")


def test_errors_of_the_system_are_one_line_and_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    for arguments in (
        ["quantize", "default", str(tmp_path / "file" / "out")],
        ["quantize", "default", str(tmp_path / ("n" * 300))],
        ["inspect", str(tmp_path / ("n" * 300))],
        ["eval", str(tmp_path / ("n" * 300)), "--text", str(tmp_path / "file")],
    ):
        assert main(arguments) == 2, arguments
        printed = capsys.readouterr().err.strip().splitlines()
        assert len(printed) == 1, printed
        assert printed[0].startswith("nvfp4: "), printed


def test_a_reader_that_has_seen_enough_ends_it_quietly(tmp_path: Path) -> None:
    script = "import sys; from server.cli import main; sys.exit(main(['version']))"
    done = subprocess.run(
        ["bash", "-c", f'set -o pipefail; "{sys.executable}" -c "{script}" | true'], capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "flag"),
    [
        (["--served-model-name", " "], "--served-model-name"),
        (["--simulate", "--simulate-step-seconds", "-1"], "--simulate-step-seconds"),
        (["--host", "bad..host", "--allow-unauthenticated"], "--host"),
    ],
)
def test_wishes_that_cannot_be_are_refused(flags: list[str], flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "0", *flags]) == 1
    assert flag in capsys.readouterr().err


def test_a_misspelt_environment_variable_is_said_with_what_was_meant(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NVFP4_MAX_NUM_SEQ", "3")
    monkeypatch.setenv("NVFP4_ISA", "avx2")
    warn_of_unknown(["max_num_seqs", "model"])
    (record,) = caplog.records
    assert "NVFP4_MAX_NUM_SEQ sets no flag of serve; did you mean NVFP4_MAX_NUM_SEQS?" in record.getMessage()


@pytest.mark.parametrize("flag", [["--two-pass"], ["--scratch", "/tmp"]])
def test_flags_about_a_teacher_need_one(flag: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "m", "--text", "t", *flag]) == 1
    assert "there is no --teacher" in capsys.readouterr().err

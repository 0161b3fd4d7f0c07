"""What XLA compiles for GPUs, on a machine that needs none. `make gpu-compile` installs the compiler."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from vit_nabirds.audit import program
from vit_nabirds.audit.estimate import largest_batch
from vit_nabirds.errors import ConfigError
from vit_nabirds.parallel import gpus
from vit_nabirds.training.products import flops_of_products

compiles = pytest.mark.skipif(not gpus.can_compile(), reason="JAX's CUDA plug-in is not here: run `make gpu-compile`")
REPOSITORY = Path(__file__).parent.parent
WITHOUT_PLUGIN = """
import sys
sys.modules["jax_plugins"] = None
from vit_nabirds.cli import main
sys.exit(main(sys.argv[1:]))
"""
# MiB of working memory of ViT-B/16 at 224 px in bfloat16, 64 photographs a GPU, as compiled by jax 0.10.2.
BUDGET = {"ViT-B/16": 3474, "ViT-B/16 with remat": 896, "ViT-B/16 on A100s": 3980}


@pytest.fixture(scope="module")
def audits():
    command = [sys.executable, Path(__file__).parent / "gpu_audits.py"]
    path = {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}
    done = subprocess.run(command, env=os.environ | path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout) | {"log": done.stderr}


@compiles
@pytest.mark.parametrize("case", BUDGET)
def test_the_working_memory_is_within_its_budget(audits, case):
    assert audits[case]["working MiB"] <= 1.05 * BUDGET[case]


@compiles
@pytest.mark.parametrize("case, calls", [("ViT-B/16", [11, 11]), ("ViT-B/16 with remat", [22, 11]), ("tiny", [2, 2])])
def test_attention_is_fused_in_all_blocks_but_the_last(audits, case, calls):
    assert audits[case]["attentions"] == calls


@compiles
def test_attention_that_cannot_be_fused_is_explained_once(audits):
    assert audits["tiny, float32"]["attentions"] == [0, 0] and audits["scoring"]["attentions"] == [2, 0]
    lines = [line for line in audits["log"].splitlines() if "attention is computed by XLA" in line]
    assert len(lines) == 1 and "got float32" in lines[0]


@compiles
@pytest.mark.parametrize("case", BUDGET)
def test_gradients_are_summed_in_float32_beside_the_backward_pass(audits, case):
    sums, sent = audits[case]["collectives"], 4 * audits[case]["parameters"]
    assert {c["kind"] for c in sums} == {"all-reduce"} and all(c["asynchronous"] for c in sums)
    assert sum(c["bytes"] for c in sums if c["dtype"] == "f32") == sent + 2 * 4  # and loss and accuracy
    assert sum(c["bytes"] for c in sums if c["dtype"] != "f32") == 4  # the checksum of the records
    assert len(sums) <= 16
    assert sum(c["bytes"] for c in sums if c["products"]) >= 0.95 * sent
    assert sum(c["bytes"] for c in sums if c["products"] >= 3) >= 0.8 * sent


@compiles
def test_half_of_the_bytes_are_sent_by_choice(audits):
    sums = audits["tiny, bfloat16 sums"]["collectives"]
    assert sum(c["bytes"] for c in sums if c["dtype"] == "bf16") == 2 * audits["tiny"]["parameters"]
    assert sum(c["bytes"] for c in sums if c["dtype"] != "bf16") == 3 * 4
    assert audits["tiny, one GPU"]["collectives"] == []


@compiles
@pytest.mark.parametrize("case, passes", [("tiny, fsdp", 1), ("tiny, fsdp and remat", 2)])
def test_with_fsdp_parameters_are_gathered_and_gradients_scattered_and_nothing_else_is_sent(audits, case, passes):
    """Four GPUs of a node share the parameters; two nodes have a copy each."""
    split, whole = audits[case]["split"], audits[case]["parameters"] - audits[case]["split"]
    found = {}
    for c in audits[case]["collectives"]:
        found[c["kind"]] = found.get(c["kind"], 0) + c["bytes"]
    assert found.keys() == {"all-gather", "reduce-scatter", "all-reduce"} and whole < split / 20
    assert found["reduce-scatter"] == 4 * split / 4  # float32, a quarter on each GPU
    assert found["all-reduce"] == pytest.approx(4 * split / 4 + 4 * whole, rel=0.01)
    # In bfloat16, but for the classifier; with remat those of the blocks again.
    assert (passes - 0.5) * 2 * split < found["all-gather"] < (passes + 0.5) * 2 * split


@compiles
def test_gradients_of_microbatches_are_sent_once(audits):
    sent = sum(c["bytes"] for c in audits["tiny, microbatch"]["collectives"])
    assert sent == pytest.approx(4 * audits["tiny"]["parameters"], rel=0.01)
    assert audits["tiny, microbatch"]["working MiB"] < 0.7 * audits["tiny"]["working MiB"]


@compiles
def test_an_evaluation_sends_its_answers_and_neither_logits_nor_counts(audits):
    """For each of 64 photographs: row, label, mask, the likeliest class, and five classes and probabilities."""
    sent = dict(audits["scoring"]["collectives"])
    assert sent.keys() == {"all-gather", "all-reduce"} and sent["all-reduce"] == 4  # the loss
    assert sent["all-gather"] <= 64 * (4 + 2 * 5) * 4


@compiles
@pytest.mark.parametrize("case", ["ViT-B/16", "ViT-B/16 with remat", "tiny", "tiny, float32", "tiny, one GPU"])
def test_the_state_is_donated_whole_and_the_host_has_no_part_in_a_step(audits, case):
    assert audits[case]["donated"] == audits[case]["state"]
    assert audits[case]["host"] == []


@compiles
def test_check_says_what_fits_and_writes_nothing(main, tmp_path):
    arguments = ["check", *main.tiny, "--workdir=run", "--config.compute_dtype=bfloat16"]
    done = main(*arguments, "--gpus=2x4 h100")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("run on 8 H100 80GB HBM3 on 2 nodes\n") and done.stdout.endswith("\nready\n")
    for text in ("15 test photographs", "20 steps of 8 photographs", "all-reduce", "images/s", "59.3 GiB can be had"):
        assert text in done.stdout
    small = {"XLA_CLIENT_MEM_FRACTION": "0.00001"}
    done = main(*arguments, "--gpus=h100", env=main.environment() | small)
    assert done.returncode == 1 and "the step does not fit: use " in done.stdout and "ready" not in done.stdout
    assert not any(tmp_path.iterdir())


def test_check_without_gpus_or_their_compiler_is_of_the_cpu(main, tmp_path):
    done = main("check", *main.tiny, devices=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("runs/tiny_config on the CPU, as 2 devices\n") and done.stdout.endswith("\nready\n")
    assert "memory       " in done.stdout and "all-reduce" in done.stdout
    command = [sys.executable, "-c", WITHOUT_PLUGIN, "check", *main.tiny, "--gpus=2 h100"]
    done = subprocess.run(command, env=main.environment(2), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("runs/tiny_config on the CPU, as 2 devices\n")
    assert "the CPU's program: for that of the GPUs, run `make gpu-compile`" in done.stdout
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text, machines", [("h100", (1, 1)), ("8 A100-80", (1, 8)), ("2x4 h200", (2, 4)), (" 16 x 4 l40s ", (16, 4))]
)
def test_machines_are_described_by_nodes_gpus_and_name(text, machines):
    found = gpus.parse(text)
    assert (found.nodes, found.per_node) == machines and found.gpu is gpus.GPUS[text.split()[-1].lower()]


@pytest.mark.parametrize(
    "text", ["", "b200", "0 h100", "00 h100", "2x h100", "4x4", "-1 h100", "2 x 99999 h100", "h100 x2"]
)
def test_machines_that_are_not_known_are_a_mistake(text):
    with pytest.raises(ConfigError, match=r"--gpus is .*(like '2x4 h100'|up to 4096)"):
        gpus.parse(text)


TEXT = """
ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %all-reduce-start.1 = (f32[8]{0}, f32[8]{0}) all-reduce-start(%p), channel_id=1
  %a = (bf16[4,4]{1,0}, s8[16]{0}) custom-call(%p), custom_call_target="__cublas$lt$matmul"
  %b = f32[4]{0} fusion(%p), kind=kLoop
  %all-reduce-done.1 = f32[8]{0} all-reduce-done((f32[8]{0}, f32[8]{0}) %all-reduce-start.1)
  %c = (bf16[4,4]{1,0}, s8[16]{0}) custom-call(%b), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %all-gather = u32[2]{0} all-gather(%b), channel_id=2
}
"""


def test_a_program_is_read():
    first, second = program.collectives(TEXT)
    assert first == program.Collective("all-reduce", "f32", 32, asynchronous=True, products=1)
    assert second == program.Collective("all-gather", "u32", 8, asynchronous=False, products=0)
    assert program.fused_attentions(TEXT) == (1, 0)
    assert program.host_traffic(TEXT + '  %d = f32[] custom-call(), custom_call_target="xla_ffi_python_gpu_callback"')


@pytest.mark.parametrize("images, largest", [(64, 128), (100, 128), (1000, 128), (128, 128), (140, 140)])
def test_the_largest_batch_is_one_that_fits(images, largest):
    assert largest_batch(lambda batch: 1000 + 10 * batch, images, available=2500) == largest
    assert largest_batch(lambda batch: 3000 + 10 * batch, images, available=2500) == 0
    # Where memory grows faster than expected, fewer; where it does not grow, at least those that fit.
    assert largest_batch(lambda batch: 1000 + 10 * batch + 5000 * (batch >= 128), 64, available=2500) == 64
    assert largest_batch(lambda batch: 1000, images, available=2500) >= images
    assert largest_batch(lambda batch: 2000, images, available=1500) == 0


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_check_ends_at_once_in_the_middle_of_a_compilation(main, tmp_path, signal_number):
    birds = {"TMPDIR": str(tmp_path)}
    process = main("check", *main.tiny, "--config.model.num_layers=8", start_only=True, env=main.environment() | birds)
    for line in process.stdout:
        if "compiling" in line:
            process.send_signal(signal_number)
            break
    rest = process.stdout.read()
    assert rest.endswith("stopped\n") and "compiled in" not in rest and process.wait() == 75
    assert not any(tmp_path.iterdir())


MISTAKES = {
    "not shared": (["--gpus=3 h100"], {}, 2, "config.batch_size is 8, which 3 devices cannot share equally"),
    "share of memory": ([], {"XLA_CLIENT_MEM_FRACTION": "75%"}, 2, "XLA_CLIENT_MEM_FRACTION is '75%': it must be"),
    "two shares": (
        [], {"XLA_CLIENT_MEM_FRACTION": "0.5", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, 2, "the environment has both",
    ),
    "below a file": (["--workdir=file/run"], {}, 1, "file is a file, where a run needs a folder"),
    "other files": (
        ["--config.data.synthetic=true", "--config.data.root=."], {}, 2, "holds other files: birds are drawn",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_of_check(main, tmp_path, case):
    arguments, variables, code, message = MISTAKES[case]
    (tmp_path / "file").write_text("")
    done = main("check", *main.tiny, *arguments, env=main.environment() | variables)
    assert done.returncode == code and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stdout == ""


LOOP = """
%body (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %all-reduce.2 = f32[8]{0} all-reduce(%p), channel_id=2
}

ENTRY %main (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  %w = f32[8]{0} while(%q), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %all-reduce.1 = f32[8]{0} all-reduce(%w), channel_id=1
}
"""


def test_what_a_loop_repeats_counts_as_often():
    assert [c.bytes for c in program.collectives(LOOP)] == [32] * 6
    assert program.memory_traffic(LOOP) == 6 * 2 * 32
    square = jax.make_jaxpr(lambda x: jax.lax.scan(lambda y, _: (y @ x, None), x, length=5)[0])(jnp.ones((8, 8)))
    assert flops_of_products(square.jaxpr) == 5 * 2 * 8**3


def test_products_that_are_not_needed_are_not_counted():
    def half(x):
        return x @ x, (x.T @ x @ x)[0]

    def counted(function):
        return flops_of_products(jax.make_jaxpr(function)(jnp.ones((8, 8))).jaxpr)

    assert counted(half) == 3 * counted(lambda x: half(x)[0]) == 3 * 2 * 8**3

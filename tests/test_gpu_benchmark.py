"""`python -m benchmarks.gpu` and `python -m benchmarks.kernels cuda`: what needs no GPU. No times are asserted."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastlm
from benchmarks.gpu import proof, rates, run, speed
from benchmarks.gpu.rates import Ceilings, Cost
from benchmarks.gpu.record import LeftOut, Record
from benchmarks.gpu.run import Part
from benchmarks.kernels import chips, objects, sass, triton_predictions, work
from fastlm.bench import steps
from fastlm.bench.ops import BACKWARD, FORWARD
from fastlm.ops.case import Case, Maker, all_cases

TINY = steps.Size("tiny", fastlm.GPTConfig(vocab_size=61, block_size=72, n_layer=1, n_head=2, n_embd=32), 2, 16)
WHERE = {
    **{"date": "2030-01-02T03:04:05", "fastlm": "1", "commit": "abc", "driver": None, "cuda": None, "python": "3.11"},
    **{"versions": {"torch": "2.13", "triton": None}, "gpu": None, "cpu": "some CPU"},
}
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def case_of(op: str, name: str) -> Case:
    return next(c for c in all_cases() if c.op == op and c.name == name)


# What the machine code says


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [(32, 256, 0, 8), (255, 128, 0, 2), (128, 256, 0, 2), (32, 128, 48 * 1024, 3), (16, 32, 0, 32), (40, 1024, 0, 1)],
)
def test_occupancy(registers: int, threads: int, shared: int, blocks: int) -> None:
    """As CUDA's occupancy calculator has it for compute capability 8.0."""
    assert chips.occupancy(chips.A100, registers, threads, shared) == (blocks, blocks * threads / 2048)


def test_roofline_is_the_nearer_limit() -> None:
    assert chips.roofline(chips.A100, 2.039e12, 1.0) == (1.0, "memory")
    assert chips.roofline(chips.A100, 1.0, 312e12) == (1.0, "matrix products")
    assert chips.roofline(chips.A100, 1.0, 156e12, tf32=True) == (1.0, "matrix products")
    assert chips.roofline(chips.H100, 1.0, 989.4e12)[0] > 1.5  # mma.sync does not reach wgmma's rate


def test_wgmma_reaches_the_full_rate_where_shared_memory_lets_it() -> None:
    assert chips.roofline(chips.H100, 1.0, 989.4e12, wgmma=True) == (1.0, "matrix products")
    assert chips.wgmma_shared_limit(192) == chips.wgmma_shared_limit(64) == 1.0
    assert chips.wgmma_shared_limit(32) == pytest.approx(2 / 3)
    text = code("HGMMA.64x192x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", "@P0 BRA 0x0", "EXIT")
    loop = sass.main_loop(sass.functions(text)["kernel"])
    assert loop is not None and loop.wgmma_columns == 192


def test_other_instructions_keep_the_tensor_cores_idle() -> None:
    assert chips.issue_limit(chips.H100, 10, 100) == 0.4
    assert chips.issue_limit(chips.A100, 10, 40) == 1.0
    assert chips.roofline(chips.A100, 1.0, 312e12, busy=0.5) == (2.0, "issued instructions")


def test_shared_memory_serves_all_schedulers() -> None:
    assert chips.shared_limit(chips.H100, 10, 40) == 0.25
    assert chips.shared_limit(chips.A100, 10, 10) == 1.0
    assert chips.shared_limit(chips.A100, 10, 0) == 1.0
    assert chips.roofline(chips.A100, 1.0, 312e12, busy=0.75, shared=0.5) == (2.0, "shared memory")
    wide = [
        "LDSM.16.MT88.4 R4, [R5]",
        "@P0 STS.64 [R1], R2",
        "LDS R1, [R2]",
        "LDGSTS.E.BYPASS.LTC128B.128 [R1], [R2.64]",
    ]
    assert [sass.wavefronts(text) for text in [*wide, "LDSM.16.M88 R4, [R5]", "LDG.E.128 R1, [R2]"]] == [
        4,
        2,
        1,
        4,
        1,
        0,
    ]


def code(*instructions: str) -> str:
    lines = [f"        /*{16 * i:04x}*/                   {text} ;" for i, text in enumerate(instructions)]
    return "\n".join(["\t\tFunction : kernel", *lines])


def test_the_main_loop_is_the_one_with_the_tensor_cores() -> None:
    text = code(
        *("LDG.E R1, [R2]", "@!P0 BRA 0x0"),  # a loop, 0x00 to 0x10
        *("LDSM.16.M88.4 R4, [R5]", "@P1 HMMA.16816.F32 R8, R4, R6, R8", "NOP", "@P0 BRA 0x20"),  # 0x20 to 0x50
        *("EXIT", "BRA 0x70"),
    )
    loop = sass.main_loop(sass.functions(text)["kernel"])
    assert loop is not None and loop.counts == {"LDSM": 1, "HMMA": 1, "BRA": 1} and not loop.aside
    assert loop.number("tensor core") == 1 and loop.share("LDSM") == pytest.approx(1 / 3)
    assert loop.wavefronts == 4


def test_a_first_pass_before_the_loop_does_not_make_the_loop_around_both_the_main_one() -> None:
    text = code(
        *("HGMMA.64x192x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT", "MUFU.EX2 R1, R2"),  # 0x00: the outer loop begins
        *("HGMMA.64x192x16.F32.BF16 R24, gdesc[UR8], R24", "@P0 BRA 0x20"),  # 0x20: the inner one
        *("MUFU.EX2 R1, R2", "@P1 BRA 0x0", "EXIT"),
    )
    loop = sass.main_loop(sass.functions(text)["kernel"])
    assert loop is not None and loop.counts == {"HGMMA": 1, "BRA": 1}


def test_what_was_moved_out_of_the_loop_is_counted_beside_it() -> None:
    text = code(
        *("LDGSTS.E [R1], [R2.64]", "BRA 0x30"),  # 0x00: copies, and back into the loop
        *("HMMA R8, R4, R6, R8", "@P0 BRA 0x0", "HMMA R8, R4, R6, R8", "@P1 BRA 0x20"),
    )
    loop = sass.main_loop(sass.functions(text)["kernel"])
    assert loop is not None and loop.number("tensor core") == 2 and loop.aside == {"LDGSTS": 1, "BRA": 1}


def test_a_kernel_without_a_loop_has_no_main_loop() -> None:
    assert sass.main_loop(sass.functions(code("LDG.E R1, [R2]", "EXIT", "BRA 0x20"))["kernel"]) is None


def test_a_pass_of_a_triton_kernel_is_that_of_its_inner_loop() -> None:
    text = code(
        *("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR24], RZ", "MUFU.EX2 R1, R2"),  # 0x00: an outer loop begins
        *("HGMMA.64x32x16.F32.BF16 R24, gdesc[UR24], R24", "MUFU.EX2 R1, R2"),  # 0x20: the inner one
        *("HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR24].tnspB, R88", "@P2 BRA 0x80", "@P0 BRA 0x20", "@P1 BRA 0x0"),
        *("SYNCS.PHASECHK P2, [R1]", "BRA 0x60", "EXIT"),  # 0x80: a wait out of line, which comes back
    )
    found = triton_predictions.main_pass(sass.functions(text)["kernel"], 8)
    # Two warpgroups: 32 / 2 + 128 / 2 cycles each; (64 + 32) rows of 32 bytes from shared memory take 24, not 16.
    # A scheduler has two warps, each with five instructions, of which a MUFU takes 8 cycles.
    assert found == triton_predictions.Pass(160.0, 176.0, 16.0)
    assert found.busy == pytest.approx((160 / 192, 160 / 176))
    assert triton_predictions.main_pass(sass.functions(code("FADD R1, R2, R3", "BRA 0x0"))["kernel"], 4) is None


def test_what_ptxas_reports() -> None:
    log = """ptxas info    : Compiling entry function '_Z1av' for 'sm_80'
ptxas info    : Function properties for _Z1av
    0 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 528 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bv' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 16 registers, 400 bytes cmem[0]
"""
    first, second = objects.kernels_of(log, "sm_80", "a.cu")
    assert (first.symbol, first.registers, first.static_shared, first.spills) == ("_Z1av", 40, 528, 20)
    assert (second.symbol, second.registers, second.static_shared, second.spills) == ("_Z1bv", 16, 0, 0)
    with pytest.raises(ValueError, match="_Z1cv"):
        list(objects.kernels_of("Compiling entry function '_Z1cv' for 'sm_80'", "sm_80", "a.cu"))


def test_names_and_threads_of_kernels() -> None:
    full = "void fastlm::cuda::(anonymous namespace)::forward<__nv_bfloat16, (int)64, (bool)0>"
    assert objects.short_name(full) == "forward<bf16, 64, 0>"
    elf = "x\n.nv.info._Z1av\n\tAttribute:\tEIATTR_MAX_THREADS\n\tFormat:\tEIFMT_SVAL\n\tValue:\t0x80 0x2 0x1 \n"
    assert sass.threads_of(elf) == {"_Z1av": 256}


def test_the_representative_work_is_of_the_size_that_it_says() -> None:
    forward = work.attention("sm_80")[0]
    assert forward.flops == 4 * 2 * 16 * 8192**2 * 128 / 2  # two products, the visible half
    assert forward.bytes == 2 * 16 * 8192 * (4 * 128 * 2 + 4)  # q, k, v, the output, and lse
    for arch in chips.CHIPS:
        assert len({w.kernel for w in work.all_work(arch)}) == len(work.all_work(arch))


# Rates


def test_a_rate_is_of_the_nearer_limit() -> None:
    known = Ceilings(product=100e12, copy=1e12)
    assert rates.rate(Cost(50e12, 1.0), 1.0, known) == ("50.0 TFLOP/s", "50%")
    assert rates.rate(Cost(1.0, 0.25e12), 1.0, known) == ("250 GB/s", "25%")
    assert rates.rate(Cost(1.0, 0.25e12), 1.0, None) == ("250 GB/s", "")


def test_the_cost_of_a_case() -> None:
    def build(make: Maker) -> dict:
        return {**{n: make.randn(1, 64, 1, 8) for n in "qkv"}, "causal": True}

    case = Case("attention", "x", build, case_of("attention", "causal").eager)
    cost = rates.cost_of(case, case.build(Maker()), FORWARD)
    assert cost.flops == 2 * 2 * 64 * 64 * 8 / 2
    assert cost.bytes == 4 * 64 * 8 * 4  # q, k, v and the output
    both = rates.cost_of(case, case.build(Maker()), BACKWARD)
    assert both.flops == 3 * cost.flops and both.bytes == 2 * cost.bytes
    packed = case_of("attention_qkvpacked", "causal")
    arguments = {"qkv": Maker().randn(1, 64, 3 * 8), "n_head": 1, "n_kv_head": 1, "causal": True}
    assert rates.cost_of(packed, arguments, BACKWARD) == both


def test_kernels_belong_to_the_marker_before_them() -> None:
    kernels = [("warm", 9.0), ("a bitwise_not kernel", 5.0), ("x", 1.0), ("y", 2.0), ("bitwise_not", 5.0), ("z", 4.0)]
    assert rates.between_markers(kernels) == [3.0, 4.0]


def test_the_operations_of_a_training_step() -> None:
    c, tokens = TINY.config, TINY.batch * TINY.length
    products = 12 * c.n_embd**2 + c.vocab_size * c.n_embd
    assert speed.training_flops(TINY) == tokens * (6 * products + 6 * c.n_embd * TINY.length)


# The run


def fake(name: str, work: Callable[[Record], None]) -> Part:
    return Part(name, 5, lambda record, _: work(record))


def test_the_reports_say_what_became_of_each_part(tmp_path: Path) -> None:
    seen: list[str] = []

    def good(record: Record) -> None:
        record.table("Numbers", ("what", "rate")).add("a | b", 7)
        record.note("and so on")

    def absent(record: Record) -> None:
        raise LeftOut("there is none")

    def broken(record: Record) -> None:
        record.table("Half", ("what",)).add("first")
        seen.extend(p.name for p in tmp_path.glob("*.md"))  # the parts before are on the disk
        raise RuntimeError("no more")

    parts = [fake("good", good), fake("absent", absent), fake("broken", broken)]
    json_path, text_path = run.run(tmp_path, parts, WHERE, apart=False)
    report, text = json.loads(json_path.read_text()), text_path.read_text()
    assert seen == ["2030-01-02-no-gpu.md"] == [text_path.name]
    assert {n: p["status"] for n, p in report["parts"].items()} == {
        **{"good": "done", "absent": "left out", "broken": "failed"}
    }
    assert "| a \\| b | 7 |" in text and "- and so on" in text and "| absent | left out | there is none |" in text
    assert "| broken | failed | no more |" in text and "| first |" in text  # what it had found is kept
    assert "commit abc" in text and "torch 2.13" in text and "triton" not in text
    assert sorted(p.name for p in tmp_path.iterdir()) == [json_path.name, text_path.name]


def test_what_a_part_that_is_cut_off_has_found_is_kept(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from benchmarks.gpu.record import Record\n"
        "Record(Path(sys.argv[1])).table('Numbers', ('n',)).add(1); time.sleep(600)"
    )
    path = tmp_path / "part.json"
    assert run.run_apart([sys.executable, "-c", script, str(path)], 3) == "cut off after its 3 s"
    content = json.loads(path.read_text())
    assert content["status"] == "cut off" and content["tables"][0]["rows"] == [[1]]


def test_a_process_that_dies_is_reported(tmp_path: Path) -> None:
    assert run.run_apart([sys.executable, "-c", "raise SystemExit(3)"], 60) == "its process ended with 3"
    assert run.run_apart([sys.executable, "-c", ""], 60) is None


def test_what_measures_has_the_machine_to_itself() -> None:
    names = [[part.name for part in group] for group in run._groups(run.PARTS, side_by_side=True)]
    assert names[0] == ["conformance", "op suite", "sanitizer", "determinism"]
    assert all(len(group) == 1 for group in names[1:])
    assert [[part.name] for part in run.PARTS] == [
        [p.name for p in g] for g in run._groups(run.PARTS, side_by_side=False)
    ]


def test_parts_side_by_side_keep_their_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SIDE_BY_SIDE_CORES", 0)
    parts = [part for part in run.PARTS if part.name in ("sanitizer", "determinism", "ceilings")]
    json_path, _ = run.run(tmp_path, parts, run.environment())
    results = json.loads(json_path.read_text())["parts"]
    assert list(results) == [part.name for part in parts]
    assert all(part["status"] in ("left out", "done") for part in results.values())


def test_the_budgets_fit_into_ten_minutes() -> None:
    assert sum(part.seconds for part in run.PARTS if part.name != "compiled") <= 600
    assert [part.name for part in run.PARTS][:4] == ["conformance", "op suite", "sanitizer", "determinism"]


@no_gpu
def test_without_a_gpu_each_part_says_so(tmp_path: Path) -> None:
    parts = [part for part in run.PARTS if part.name not in ("conformance", "compiled")]
    json_path, _ = run.run(tmp_path, parts, run.environment(), apart=False)
    results = json.loads(json_path.read_text())["parts"]
    assert list(results) == [part.name for part in parts]
    assert {(p["status"], p["reason"]) for p in results.values()} == {("left out", "torch sees no CUDA GPU")}


@no_gpu
def test_without_nvcc_the_compiled_report_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise objects.Missing(f"there is no {name}")

    monkeypatch.setattr(objects, "tool", missing)
    record = run.run_part(next(p for p in run.PARTS if p.name == "compiled"), tmp_path)
    assert record.content["status"] == "left out" and record.content["reason"] == "there is no nvcc"


# The parts themselves, on small work on the CPU


def test_determinism_and_small_cases() -> None:
    record = Record()
    proof.determinism(record, "cpu", ("reference",), [case_of("attention", "causal")])
    assert record.content["tables"][0]["rows"] == [["attention causal", "reference", "yes"]]
    assert proof.small_cases("reference", "cpu") == len(proof.first_cases())


def test_a_difference_between_two_runs_fails_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "numbers", lambda *_: [torch.rand(3)])
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)
    with pytest.raises(RuntimeError, match="1 cases differ"):
        proof.determinism(Record(), "cpu", ("reference",), [case_of("attention", "causal")])


def test_the_suites_outcomes_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "test_three.py"
    file.write_text(
        "import pytest\n@pytest.mark.parametrize('n', [1, 2, 3])\ndef test(n):\n"
        "    if n == 2: pytest.skip('not here')\n    assert n != 3\n"
    )
    record = Record()
    table = record.table("Tests", ("backend", "passed", "skipped", "failed"))
    options = ["-p", "no:cacheprovider", "-c", "/dev/null", f"--rootdir={tmp_path}"]
    assert proof.run_tests(record, table, "some", [*options, str(file)]) == 1
    assert table.rows == [["some", 1, 1, 1]] and "test[3] FAILED" in record.content["notes"][0]
    assert proof.run_tests(record, table, "none", [*options, str(tmp_path / "absent.py")]) == 1
    assert "pytest ended with 4" in record.content["notes"][-1]


def test_ceilings_and_ops(tmp_path: Path) -> None:
    record = Record(tmp_path / f"{speed.NAME}.json")
    speed.ceilings(record, "cpu", size=64, copied=1 << 16)
    known = speed.known_ceilings(tmp_path)
    assert known is not None and known.product > 0 and known.copy > 0
    ops_record = Record()
    cases = [case_of("attention", "causal"), case_of("linear_act", "gelu")]
    speed.every_op(ops_record, "cpu", known, cases, 0.01, {speed.MAX_AUTOTUNE, "fastlm triton"})
    rows = ops_record.content["tables"][0]["rows"]
    assert {"eager", "fastlm cpu", "sdpa flash", speed.PRODUCT_ALONE} <= {row[2] for row in rows}
    assert all(len(row) == len(speed.HEADER) for row in rows)
    assert any("sdpa cuDNN" in note for note in ops_record.content["notes"])  # there is none on a CPU


def test_training_and_decoding() -> None:
    record = Record()
    speed.training(record, "cpu", Ceilings(1e12, 1e10), TINY, (2,), compiled=False, seconds=0.01)
    rows = record.content["tables"][0]["rows"]
    assert [row[1] for row in rows] == ["fastlm", "eager", "sdpa"]
    assert len({row[-1][:5] for row in rows}) == 1  # the same loss
    decoded = Record()
    speed.decode(decoded, "cpu", TINY, 0.01)
    assert {"fastlm", "eager"} <= {row[1] for row in decoded.content["tables"][0]["rows"]}

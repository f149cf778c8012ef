"""Mutation check: put each known mistake into a copy of the package and see the test that names it fail.

``make mutants`` runs it; exit 1 if a mutant survives, or if a test fails without one. Not collected by pytest.
"""

# ruff: noqa: E501 - the table is easier to read with one mutant a line

import contextlib
import importlib
import io
import multiprocessing
import multiprocessing.pool
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# (test, file, [(text, replacement), …])
MUTANTS = [
    ("test_mistakes.py::test_01", "reference.py", [("pack_bits(frozen | chosen)", "pack_bits(chosen)")]),
    (
        "test_mistakes.py::test_02",
        "reference.py",
        [
            ("level = torch.minimum(_max_rule(m, e), top)", "level = _max_rule(m, e).long()"),
            ("nonzero = (m > 0) & ", "nonzero = (m > 0) & (level <= top) & "),
        ],
    ),
    ("test_mistakes.py::test_03", "inq.py", [("            layers[0].n1 is None,\n", "            True,\n")]),
    ("test_mistakes.py::test_04", "reference.py", [("torch.where(m >= 0.75, e, e - 1)", "torch.where(m > 0.75, e, e - 1)")]),
    ("test_mistakes.py::test_04", "reference.py", [("& (m < 0.75), bottom", "& (m < 0.75) & (m > 0.5), bottom")]),
    ("test_mistakes.py::test_04", "format.py", [("range(1 << (bits - 2), 1 << (bits - 1))", "range(8, 16)")]),
    ("test_mistakes.py::test_05_", "inq.py", [("lambda *_: self._restore(self._written_back)", "lambda *_: None")]),
    ("test_mistakes.py::test_05b", "inq.py", [("local_part(weight.grad).masked_fill_(self.held_mask(), 0.0)", "pass")]),
    ("test_inq.py::test_lbfgs", "inq.py", [(" or isinstance(self.optimizer, torch.optim.LBFGS)", "")]),
    ("test_inq.py::test_frozen_gradients", "inq.py", [(".masked_fill_(self.held_mask(), 0.0)", ".mul_(~self.held_mask())")]),
    ("test_inq.py::test_the_error_is_the_same", "inq.py", [("added[i // 8 : (i + _PIECE) // 8]", "added[: _PIECE // 8]")]),
    ("test_mistakes.py::test_06", "format.py", [("math.floor(portion * numel + 0.5)", "int(portion * numel) - 1")]),
    (
        "test_mistakes.py::test_07",
        "hooks.py",
        [("isinstance(module, QUANTIZED_TYPES) and", "hasattr(module, 'weight') and 'bn' not in name and")],
    ),
    ("test_mistakes.py::test_08", "reference.py", [("flat = w.detach().abs().reshape(-1)", "flat = (9 - w.detach().abs()).reshape(-1)")]),
    ("test_mistakes.py::test_09", "inq.py", [('self._index, self._in_progress = state["index"], state["in_progress"]', "self._index, self._in_progress = -1, False")]),
    ("test_mistakes.py::test_09", "inq.py", [('self.mask = state["mask"].to(device, copy=True)', "pass")]),
    ("test_mistakes.py::test_09", "training.py", [('optimizer.load_state_dict(state["optimizer"]["state"])', "pass")]),
    (
        "test_mistakes.py::test_10",
        "reference.py",
        [("torch.kthvalue(keys, keys.numel() - count + 1).values", "torch.quantile(keys.double(), 0.5).long()")],
    ),
    ("test_mistakes.py::test_11", "inq.py", [("numel if prune_mask is None else int(prune_mask.sum())", "numel")]),
    ("test_mistakes.py::test_11", "format.py", [("return n1 + 1 - self.magnitudes", "return n1 + 2 - self.magnitudes")]),
    ("test_mistakes.py::test_12", "inq.py", [("        self.n1: Tensor | None = None\n", "        self.n1: Tensor | None = None\n        self.float_mask = torch.zeros(numel)\n")]),
    (
        "test_mistakes.py::test_13",
        "nn.py",
        [
            (
                "folded._set_codes(folded.weight.detach(), folded.weight_exp.detach(), scale.float().view(n, 1))",
                "folded = type(module).from_float(_scaled(module, scale), module.format)",
            ),
            (
                "def fold_batchnorm(",
                "def _scaled(module, scale):\n"
                "    module = module.to_float()\n"
                "    module.weight = nn.Parameter(module.weight * scale.float().view(-1, 1, 1, 1))\n"
                "    return module\n\n\ndef fold_batchnorm(",
            ),
        ],
    ),
    ("test_inq.py::test_schedulers", "inq.py", [("            scheduler.load_state_dict(copy.deepcopy(state))\n", "")]),
    ("test_inq.py::test_schedulers", "inq.py", [("_restore_hyperparameters(scheduler.optimizer, groups)", "pass")]),
    ("test_inq.py::test_loading_an_older", "inq.py", [("been loaded into the model since.\n        self._restore(self._layers.values())", "been loaded into the model since.")]),
    ("test_inq.py::test_the_report", "inq.py", [("histogram = {int(v) - 1: int(c)", "histogram = {int(v): int(c)")]),
    ("test_inq.py::test_the_report", "inq.py", [("sqnr_db(self.signal, self.noise)", "sqnr_db(self.noise, self.signal)")]),
    ("test_inq.py::test_a_second_run", "hooks.py", [("        if weight in _held:", "        if False:")]),
    ("test_inq.py::test_hooks_of_the_user", "hooks.py", [("    optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)\n", "")]),
    ("test_training.py::test_the_first_hyperparameters", "inq.py", [('        self._initial_groups = copy.deepcopy(state["initial_groups"])\n', "")]),
    ("test_training.py::test_forged", "training.py", [("        take_over(model, optimizer, run, before)\n", "")]),
    ("test_nn.py::test_a_failed_convert", "nn.py", [("        new.bias = module.bias\n", "        new.bias = module.bias\n        parent = model.get_submodule(name.rpartition('.')[0])\n        parent._modules[name.rpartition('.')[2]] = new\n")]),
    ("test_calibrate.py::test_the_update", "calibrate.py", [("        w[..., end:] -= errors @ u[:, start:end, end:]\n", "")]),
    ("test_calibrate.py::test_after_an_error", "calibrate.py", [('                module._parameters["weight"] = weight\n', "                pass\n")]),
    ("test_training.py::test_random_states", "training.py", [('set_rng_state(state["rng"])', "pass")]),
    ("test_training.py::test_a_flipped_bit", "training.py", [("read_tensors(path, header, checksums)", "read_tensors(path, header)")]),
    # several ranks
    ("test_distributed.py::test_four", "distributed.py", [("ties = (left - rows[0].before(here)).clamp(min=0)", "ties = left")]),
    ("test_distributed.py::test_four", "distributed.py", [("    seeds = [reference.seed_at(seed, each.first_index) for seed, each in zip(seeds, rows, strict=True)]\n", "")]),
    ("test_distributed.py::test_four", "distributed.py", [("whole = rows[0].sum(torch.cat(each))", "whole = torch.cat(each)")]),
    ("test_distributed.py::test_two", "distributed.py", [("            module.reshard()\n", "            pass\n")]),
    ("test_distributed.py::test_two", "inq.py", [("            numbers = rows.sum(numbers)\n", "            pass\n")]),
    ("test_distributed.py::test_two", "sharded.py", [("dedup_save_to_lowest_rank=True", "dedup_save_to_lowest_rank=False")]),
    ("test_distributed.py::test_two", "sharded.py", [("if saved.world_size == ranks.size else", "if False else")]),
    ("test_distributed.py::test_damaged", "sharded_files.py", [("if (found := sorted(file.name for file in path.glob(\"*.safetensors\"))) != shards:", "if False:")]),
    ("test_optim.py::test_autograd_notices", "backends.py", [("            _count_as_written(args[i])\n", "            pass\n")]),
    ("test_module_layout.py::test_a_state_dict", "nn.py", [("        if layout_of(self.weight) != STORAGE:\n            stored", "        if False:\n            stored")]),
    ("test_module_layout.py::test_a_fake_tensor", "nn.py", [("            if type(new) is Tensor:\n", "            if True:\n")]),
    ("test_triton_codec.py::test_words_hold", "triton_ops/codec.py", [("{mask:#x}, 0x28;", "{mask:#x}, 0x78;")]),
    ("test_triton_codec.py::test_words_hold", "triton_ops/codec.py", [("q, q, 0x2301;", "q, q, 0x1032;")]),
    ("test_triton_linear.py::test_sums_shared", "triton_ops/linear.py", [("        part += plane\n", "        part += 0\n")]),
    ("test_triton_linear.py::test_exponents_at", "triton_ops/codec.py", [("x * power_of_two(half) * power_of_two(e - half)", "x * power_of_two(e)")]),
    ("test_triton_linear.py::test_large_float32", "triton_ops/linear.py", [('    if dot == "fp32":\n', "    if False:\n")]),
    ("test_triton_conv2d.py::test_integers_bit", "triton_ops/conv2d.py", [("inside = (k < K)[:, None] & (y_at >= 0)", "inside = (k < K)[:, None] & (y_at >= -1)")]),
    ("test_triton_linear.py::test_rows_as_e4m3", "triton_ops/linear_fp8.py", [("raw + 0x7FFFF + ((raw >> 20) & 1)", "raw + 0x80000")]),
    ("test_triton_training.py::test_several_chunks", "triton_ops/quantize.py", [("take -= tl.sum(more, axis=0)", "take -= 0")]),
    # Pruning and the baselines.
    ("test_dns.py::test_surgery_by_hand", "dns.py", [("new = (size >= self.b) | (mask & ~(size < self.a))", "new = mask & ~(size < self.a)")]),
    ("test_dns.py::test_surgery_by_hand", "dns.py", [("new = (size >= self.b) | (mask & ~(size < self.a))", "new = ~(size < self.a)")]),
    ("test_dns.py::test_thresholds", "dns.py", [("size.std(correction=0)", "size.std()")]),
    ("test_dns.py::test_thresholds", "dns.py", [("    size = size[size != 0]\n", "")]),
    ("test_dns.py::test_it_is_the_textbook", "projection.py", [("        self._put_dense()\n        # args[0]", "        # args[0]")]),
    ("test_dns.py::test_it_is_the_textbook", "projection.py", [("return (args[0], self._at_projected(closure), *args[2:]), kwargs", "return None")]),
    ("test_dns.py::test_resume", "dns.py", [('layer.a, layer.b = values["a"], values["b"]', "pass")]),
    ("test_dns.py::test_resume", "dns.py", [('self.iteration = state["iteration"]', "pass")]),
    ("test_dns.py::test_a_step_that_raises", "projection.py", [("        if self._stepping:\n            self._put_projected()\n", "")]),
    ("test_dns.py::test_a_weight_that_becomes_nan", "dns.py", [("(mask & ~(size < self.a))", "(mask & (size >= self.a))")]),
    ("test_inq.py::test_closing_a_run_again", "inq.py", [("        if not self._handles:\n            return\n        for handle", "        for handle")]),
    ("test_baselines.py::test_a_method_that_fails", "projection.py", [("        except BaseException:\n            self._put_dense()\n            raise\n", "        finally:\n            pass\n")]),
    ("test_deep_compression.py::test_what_other_modules_share", "baselines/deep_compression.py", [("if len(shared := holders[id(weight)]) > 1:", "if len(shared := holders[id(weight)]) > 9:")]),
    ("test_dns.py::test_several_ranks", "sharded.py", [("    _check_run(_SAVE, run)\n", "")]),
    ("test_deep_compression.py::test_relative_indices_decode", "baselines/relative.py", [("fillers = zeros >> bits", "fillers = (zeros + 1) >> bits")]),
    ("test_deep_compression.py::test_huffman_by_hand", "baselines/huffman.py", [("code <<= table[symbol] - size", "code <<= 0")]),
    ("test_deep_compression.py::test_kmeans", "baselines/deep_compression.py", [("torch.where(counts > 0, ", "torch.where(counts >= 0, ")]),
    ("test_deep_compression.py::test_the_size_of", "baselines/deep_compression.py", [("int(each[~entries.fillers].sum())", "int(each.sum())")]),
    ("test_baselines.py::test_twn_by_hand", "baselines/ternary.py", [("above.sum().clamp(min=1)", "above.numel()")]),
    ("test_baselines.py::test_bwn_by_hand", "baselines/binary.py", [("weight.abs().double().flatten(1).mean(dim=1)", "weight.abs().double().mean().expand(weight.shape[0])")]),
    ("test_baselines.py::test_uniform_by_hand", "baselines/uniform.py", [("return (1 << (self.bits - 1)) - 1", "return 1 << (self.bits - 1)")]),
    ("test_baselines.py::test_training_is", "projection.py", [("        self._take_dense()\n        self._stepped()", "        self._stepped()")]),
    ("test_meter.py::test_tied", "baselines/meter.py", [("if tensor is not None and id(tensor) not in counted:", "if tensor is not None:")]),
    ("test_meter.py::test_an_inq_layer", "baselines/meter.py", [("raw - fmt.bits * n * k}", "0}")]),
    # CUDA's kernels, in the emulator: races, waits, orders, bits.
    ("test_cuda_training.py::test_keys_that_the_list", "csrc/cuda/partition.cu", [("  sync_threads();\n  shared->next.flush<kNextThreads>(c.state(p.all)->next[0]);", "  shared->next.flush<kNextThreads>(c.state(p.all)->next[0]);")]),
    ("test_cuda_training.py::test_four_readings", "csrc/cuda/select.cuh", [("ld_global(&state->wanted) != 0 && ld_global(&state->listed) == 0", "ld_global(&state->wanted) != 0")]),
    ("test_cuda_training.py::test_no_room", "csrc/cuda/partition.cu", [("? Which::kept : Which::held", "? Which::candidates : Which::held")]),
    ("test_cuda_training.py::test_thresholds_of_many", "csrc/cuda/blocks.cuh", [("    thread_fence();\n    st_shared(shared, atomic_add", "    st_shared(shared, atomic_add")]),
    ("test_cuda_training.py::test_ties_across", "csrc/cuda/quantize.cu", [("if (known == 2) atomic_min", "if (known != 0) atomic_min")]),
    ("test_cuda_training.py::test_ties_across", "csrc/cuda/quantize.cu", [("      st_global(&ties->here, in_block);\n      red_release(&ties->known, 1);", "      red_release(&ties->known, 1);\n      st_global(&ties->here, in_block);")]),
    ("test_cuda_training.py::test_sgd", "csrc/cuda/masked_step.cu", [("inside & ~(frozen >> (8 * i))", "inside & ~(frozen >> (4 * i))")]),
    ("test_cuda_dense.py::test_decoded_weights", "csrc/cuda/decode.cuh", [("constexpr uint32_t kMask = 0xCC00CC00u;", "constexpr uint32_t kMask = 0xCC008C00u;")]),
    ("test_cuda_dense.py::test_decoded_weights", "csrc/cuda/dense.cu", [("  sync_warp();\n  constexpr int kPieces", "  constexpr int kPieces")]),
    ("test_cuda_linear.py::test_the_ring", "csrc/cuda/linear.cuh", [("cp_async_wait<P::kStages - 2>();", "cp_async_wait<P::kStages - 1>();")]),
    ("test_cuda_linear.py::test_the_ring", "csrc/cuda/linear.cuh", [("      // Stage i is here for all, and all are done with the one before, whose place is filled next.\n      sync_threads();\n", "")]),
    ("test_cuda_linear.py::test_a_block_may", "csrc/cuda/linear.cuh", [("  if (ld_shared(flag) == 0) return false;\n  clear<P>(acc);\n", "  if (ld_shared(flag) == 0) return false;\n")]),
    ("test_cuda_linear_hopper.py::test_the_rings", "csrc/cuda/linear_hopper.cuh", [("    wgmma_wait<1>();", "    wgmma_wait<2>();")]),
    ("test_cuda_linear_hopper.py::test_the_rings", "csrc/cuda/linear_hopper.cuh", [("    if (kQuarter % 2 == 1) {\n      sync_warp();\n", "    if (kQuarter % 2 == 1) {\n")]),
    ("test_cuda_linear_hopper.py::test_the_rings", "csrc/cuda/linear_hopper.cuh", [("if (++at == kDepth) at = 0, parity ^= 1;", "if (++at == kDepth) at = 0;")]),
]  # fmt: skip


# Where the compiled library is what a test is about; the others test the definition.
COMPILED = ("test_optim.py", "test_module_layout.py")


# Compiled kernels of the emulator, which the copies share: by what is in their sources.
CACHE = tempfile.TemporaryDirectory(prefix="emulator")


def fill_cache() -> None:
    """With what `make test` has compiled."""
    for known in (ROOT / "build" / "emulator").glob("*.o"):
        shutil.copy(known, CACHE.name)


def run_tests(folder: Path, test: str) -> tuple[int, str]:
    """pytest's exit code and output, in this process: once for each."""
    import pytest

    file, name = test.split("::")
    os.environ["INQ_BACKEND"] = "" if file in COMPILED else "reference"
    os.environ["INQ_EMULATOR_CACHE"] = CACHE.name
    # The copy comes before the installed package, here and in processes that tests start.
    os.environ["PYTHONPATH"] = str(folder)
    sys.path[:] = [str(folder), *(path for path in sys.path if Path(path) != ROOT / "tests")]
    os.chdir(folder)
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", f"tests/{file}", "-k", name])
    os.chdir(ROOT)
    return int(code), output.getvalue()


def copy_of(folder: Path) -> Path:
    for name, place in (("inq_kernels", ""), ("tests", ""), ("csrc", ""), ("triton_ops", "inq_kernels")):
        shutil.copytree(ROOT / name, folder / place / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def check(mutant: tuple) -> str | None:
    """None if the mutant is caught, else what went wrong."""
    test, file, changes = mutant
    with tempfile.TemporaryDirectory() as temporary:
        folder = copy_of(Path(temporary))
        path = folder / ("" if file.startswith("csrc/") else "inq_kernels") / file
        text = path.read_text()
        for old, new in changes:
            if text.count(old) != 1:
                return f"{test}: {file}: expected {old!r} once, found it {text.count(old)} times: mend the mutant"
            text = text.replace(old, new)
        path.write_text(text)
        code, output = run_tests(folder, test)
        if code == 1:
            return None
        return f"{test}: survived {changes[0][1]!r} in {file} (pytest exit {code})\n{output[-600:]}"


def check_sound(test: str) -> str | None:
    """None if the test passes without a mutant, else what it says."""
    with tempfile.TemporaryDirectory() as temporary:
        code, output = run_tests(copy_of(Path(temporary)), test)
        return f"{test}: fails without a mutant\n{output[-600:]}" if code else None


def workers() -> multiprocessing.pool.Pool:
    """A fresh process for each task, which has imported already what takes longer than most tests."""
    # One thread each leaves the other core to the other mutant.
    os.environ["OMP_NUM_THREADS"] = "1"
    # torch's optimizers import torch._dynamo, and that Triton, which then has to know already what conftest.py sets.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    for module in ("torch", "torch._dynamo", "pytest"):
        importlib.import_module(module)

    return multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1)


def main() -> int:
    wanted = [m for m in MUTANTS if len(sys.argv) < 2 or any(a in m[0] for a in sys.argv[1:])]
    fill_cache()
    # Without a mutant a file's tests fit one process.
    names: dict[str, list[str]] = {}
    for file, name in (m[0].split("::") for m in wanted):
        names.setdefault(file, []).append(name)
    sound = [f"{file}::{' or '.join(dict.fromkeys(each))}" for file, each in names.items()]
    with workers() as pool:
        broken = [problem for problem in pool.imap(check_sound, sound) if problem]
        problems = [problem for problem in pool.imap(check, wanted) if problem]
    for problem in [*broken, *problems]:
        print(problem)
    failed = len(problems) + len(broken)
    print(f"{len(wanted) - len(problems)} mutants caught\n{len(wanted) - len(problems)} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Mutation check of the file layer and the command line: as ``mutants.py``, with a table of its own, since it takes ten
minutes. ``python tests/mutants_files.py [part of a test's name]``; not collected by pytest.
"""

# ruff: noqa: E501 - the table is easier to read with one mutant a line

import sys

import mutants

F, C, K, E = "test_files.py", "test_checkpoint.py", "test_cli.py", "test_compression.py"
Z, X, N = "test_fuzz.py", "test_faults.py", "test_no_pickle.py"
files, ff, ck, tr, cli, tn = "files.py", "file_format.py", "checkpoint.py", "transcode.py", "cli.py", "training.py"
co = "compression.py"

# (test, file, [(text, replacement), …])
MUTANTS = [
    # files: reading
    (f"{C}::malformed", files, [("if len(result) != len(items):","if False:")]),
    (f"{C}::malformed", files, [("if not allow_nan:\n            refuse(\"JSON","if False:\n            refuse(\"JSON")]),
    (f"{C}::malformed", files, [("    except RecursionError:\n","    except ZeroDivisionError:\n")]),
    (f"{C}::malformed", files, [("if length > MAX_JSON:","if False:")]),
    (f"{C}::malformed", files, [("if length > size - 8:","if False:")]),
    (f"{C}::malformed", files, [("return isinstance(value, int) and not isinstance(value, bool) and low","return isinstance(value, int) and low")]),
    (f"{C}::malformed", files, [("if not _NAME.fullmatch(name):","if not _NAME.match(name):")]),
    (f"{C}::malformed", files, [("if math.prod(max(d, 1) for d in shape) > MAX_ELEMENTS:","if False:")]),
    (f"{C}::malformed", files, [("if begin > end:","if False:")]),
    (f"{C}::malformed", files, [("if end - begin != nbytes:","if False:")]),
    (f"{C}::malformed", files, [("if info.begin != position:","if info.begin < position:")]),
    (f"{C}::malformed", files, [("if info.begin != position:","if info.begin > position:")]),
    (f"{C}::malformed", files, [("if position != data_size:","if position > data_size:")]),
    (f"{C}::malformed", files, [("if position != data_size:","if position < data_size:")]),
    (f"{C}::malformed", files, [("if not stat.S_ISREG(mode.st_mode):","if stat.S_ISDIR(mode.st_mode):")]),
    (f"{C}::malformed", files, [("if real is not None and not real.is_relative_to(os.path.realpath(root)):","if False:")]),
    (f"{C}::malformed", files, [("if size > MAX_JSON:\n        raise CheckpointError(f\"{path}: expected a JSON","if False:\n        raise CheckpointError(f\"{path}: expected a JSON")]),
    (f"{C}::malformed", files, [("if path.suffix.lower() in PICKLE_SUFFIXES:","if path.suffix in PICKLE_SUFFIXES:")]),
    (f"{F}::aligned_memory", files, [("file.get_tensor(name).clone()","file.get_tensor(name)")]),
    (f"{F}::only_the_named", files, [("(got := sha256(tensor)) != expected","(got := sha256(tensor)) == 0")]),
    (f"{F}::changes_between", files, [("if tensor.dtype != info.dtype or tuple(tensor.shape) != info.shape:","if False:")]),
    (f"{F}::sha256_copies", files, [("    return hashlib.sha256((ctypes.c_ubyte * flat.numel()).from_address(flat.data_ptr())).hexdigest()","    return hashlib.sha256(bytes((ctypes.c_ubyte * flat.numel()).from_address(flat.data_ptr()))).hexdigest()")]),
    # files: writing
    (f"{F}::permission", files, [("        os.chmod(temporary, mode)  # the library leaves 0600\n","")]),
    (f"{F}::views", files, [("tensor.clone() if memory in seen else tensor","tensor")]),
    (f"{F}::a_failed_step_leaves_the_old_file", files, [("        os.replace(temporary, target)\n    except BaseException:\n        temporary.unlink(missing_ok=True)\n        raise\n    _fsync(target.parent)\n\n\ndef _sort_metadata","        os.replace(temporary, target)\n    except Exception:\n        temporary.unlink(missing_ok=True)\n        raise\n    _fsync(target.parent)\n\n\ndef _sort_metadata")]),
    (f"{F}::a_failed_step_leaves_the_old_file", files, [("        _verify_written(temporary, tensors, metadata)\n        os.replace(temporary, target)","        os.replace(temporary, target)\n        _verify_written(target, tensors, metadata)")]),
    (f"{F}::a_failed_step_leaves_the_old_file", files, [("    temporary = _beside(target)\n    try:\n        mode = _fresh_file(temporary)\n        with","    temporary = target\n    try:\n        mode = 0o644\n        with")]),
    (f"{F}::found_out", files, [("        _verify_written(temporary, tensors, metadata)\n","")]),
    (f"{F}::failed_sync_of_the_parent", files, [("    _fsync(target.parent)\n\n\ndef _sort_metadata","\n\ndef write_text")]),
    (f"{F}::killed", files, [("    temporary = _beside(target)\n    try:\n        mode = _fresh_file(temporary)\n        with","    temporary = target\n    try:\n        mode = 0o644\n        with"),("            save_file(tensors, temporary, metadata)","            import io, safetensors.torch as st; fh = open(temporary, 'wb', buffering=0); b = st.save(tensors, metadata); [fh.write(b[i:i+1000]) for i in range(0, len(b), 1000)]; fh.close()")]),
    (f"{F}::killed or exchange", files, [("    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):","    if True:")]),
    (f"{F}::no_space", files, [("        with _library_errors(target):\n            save_file","        if True:\n            save_file")]),
    (f"{F}::no_space", files, [("        shutil.rmtree(temporary, ignore_errors=True)\n        raise\n","        raise\n")]),
    (f"{F}::something_else", files, [("    if entries and not (checkpoint and all(entry.is_file(follow_symlinks=False) for entry in entries)):","    if entries and not checkpoint:")]),
    (f"{F}::something_else", files, [("        # Again: fill may have taken hours.\n        _check_replaceable(target)\n","")]),
    (f"{F}::two_renames", files, [("        os.rename(aside, old)\n        raise","        raise")]),
    (f"{F}::cannot_be_listed", files, [(", topdown=False, onerror=refuse)",", topdown=False)")]),
    (f"{F}::link_is_followed", files, [("target = Path(os.path.realpath(path))","target = Path(os.path.abspath(path))")]),
    # file format
    (f"{C}::malformed", ff, [("if (got := hashlib.sha256(text.encode()).hexdigest()) != header.metadata.get(_DIGEST_KEY):","if False:")]),
    (f"{C}::malformed", ff, [("    if set(content) != set(header.tensors):","    if False:")]),
    (f"{C}::malformed", ff, [("if entry.format is None and (entry.dtype, entry.shape) != (info.dtype, info.shape):","if False:")]),
    (f"{C}::malformed", ff, [("        if found != entry.exponents:","        if False:")]),
    (f"{C}::malformed", ff, [("    if low < least or high > largest:","    if False:")]),
    (f"{C}::malformed", ff, [("    if bad:\n        raise CheckpointError(\n            f\"{weight}: expected canonical","    if False:\n        raise CheckpointError(\n            f\"{weight}: expected canonical")]),
    (f"{C}::malformed", ff, [("if scale is not None and (bad := ","if False and (bad := ")]),
    (f"{C}::malformed", ff, [("    if version > COMPRESSED_VERSION:","    if False:")]),
    (f"{C}::malformed", ff, [("if not isinstance(file, str) or not _SHARD.fullmatch(file):","if not isinstance(file, str):")]),
    (f"{C}::malformed", ff, [("        if found != names:","        if names - found:")]),
    (f"{C}::malformed", ff, [("        if got != expected:\n","        if False:\n")]),
    (f"{C}::malformed", ff, [("if len(found) == 2 and found[0][1] != found[1][1]:","if False:")]),
    (f"{C}::large_weights", ff, [("for start in range(0, packed.shape[0], rows):","for start in range(0, packed.shape[0] - rows, rows):")]),
    (f"{C}::hub", ff, [('if real.parent.name == "snapshots" else real','if False else real')]),
    (f"{C}::golden", ff, [('"exponent": "exponent_rule"','"exponent": "rule"')]),
    # checkpoint
    (f"{C}::halfway", ck, [("    except BaseException:\n        undo.all()\n        raise","    except BaseException:\n        raise")]),
    (f"{C}::halfway", ck, [("            if tensor.device.type != \"meta\":\n                tensor.data = data","            pass")]),
    (f"{C}::halfway", ck, [("            content.clear()\n            content.update(before)","            pass")]),
    (f"{C}::does_not_fit", ck, [("    if missing or unexpected:","    if missing:")]),
    (f"{C}::does_not_fit", ck, [("    if missing or unexpected:","    if unexpected:")]),
    (f"{C}::does_not_fit", ck, [("if (entry.dtype, entry.shape) != (old.dtype, tuple(old.shape)):","if entry.shape != tuple(old.shape):")]),
    (f"{C}::does_not_fit", ck, [("if module.format != entry.format:","if False:")]),
    (f"{C}::does_not_fit", ck, [("    if shape != entry.shape:","    if False:")]),
    (f"{C}::tied or shared", ck, [("        if entry != expected:","        if False:")]),
    (f"{C}::same_objects", ck, [('    if old.device.type != "meta":\n        old.data = new\n        return\n','')]),
    (f"{C}::hooks", ck, [("torch.empty_like(old.detach(), device=_device(old)).copy_(value)","value.to(_device(old))")]),
    (f"{C}::hooks", "nn.py", [("    new._inherit(module)\n","")]),
    (f"{C}::dtype_before", ck, [("dtype if fits and value.weight_scale is None else torch.float32","dtype")]),
    (f"{C}::state_dict or refuses", ck, [("if odd := set(model.state_dict()) ^ set(slots):","if odd := set():")]),
    (f"{C}::inspect_counts", ck, [("8 * stored / numel","8 * packed.weight.nbytes / numel")]),
    # compression
    (f"{E}::malformed", co, [("    if (got := files.sha256(weight)) != coding.sha256:","    if (got := \"\"):")]),
    (f"{E}::malformed", co, [("            if not got:","            if not got and not at:")]),
    (f"{E}::malformed", co, [("        if self._into(np.empty(1, np.uint8)):","        if False:")]),
    (f"{E}::malformed", co, [("max_window_size=1 << _WINDOW_LOG","max_window_size=1 << 31")]),
    (f"{E}::malformed", co, [("read_across_frames=True","read_across_frames=False")]),
    (f"{E}::malformed", co, [("    if data[ends[-1] :].any():","    if False:")]),
    (f"{E}::malformed", co, [("        if int(symbols.max()) >> used:","        if False:")]),
    (f"{E}::malformed", co, [("    if surplus or int","    if int")]),
    (f"{E}::malformed", co, [("    if surplus or int.from_bytes(flat[-bits:].tobytes(), \"little\") >> bits * ((count - 1) % 8 + 1):","    if surplus:")]),
    (f"{E}::malformed", co, [("        if size % 8 and mask[-1] >> size % 8:","        if False:")]),
    (f"{E}::malformed", co, [("            raise CheckpointError(f\"{stream.where}: expected no zeros, which are taken out, got some\")","            pass")]),
    (f"{E}::malformed", co, [("            raise CheckpointError(f\"{stream.where}: expected numbers of the","            print(f\"{stream.where}: expected numbers of the")]),
    (f"{E}::malformed", co, [("MAX_RATIO = 64","MAX_RATIO = 65")]),
    (f"{E}::malformed", co, [(" or (values and not zeros)","")]),
    (f"{E}::malformed", co, [("any(a >= b for a, b in pairwise(values))","any(a > b for a, b in pairwise(values))")]),
    (f"{E}::malformed", ff, [("        if version != configuration[\"format_version\"]:","        if False:")]),
    (f"{E}::malformed", ff, [("        if entry.coding is not None and int(version) < COMPRESSED_VERSION:","        if False:")]),
    (f"{E}::malformed", ff, [("        check_packed(path, name, packed, entry.dtype)\n","")]),
    (f"{E}::refuse_it_by_name", ff, [("    if version > newest:","    if False:")]),
    (f"{E}::zstandard", ff, [("        compression.check_available(str(path))\n    return checkpoint","        pass\n    return checkpoint")]),
    (f"{E}::counted_as", ff, [("fmt.n2(int(n1.min())) >= N1_MIN:","True:")]),
    (f"{E}::counted_as", ff, [("        if torch.equal(torch.ops","        if not torch.equal(torch.ops")]),
    (f"{E}::does_not_decode", co, [("    if not torch.equal(decode(where, stored, coding, shape, fmt), weight):","    if False:")]),
    (f"{E}::byte_for_byte", ff, [("return COMPRESSED_VERSION if compress else FORMAT_VERSION","return COMPRESSED_VERSION")]),
    (f"{E}::rewriting", tr, [('"format_version": version_of(compress)}','"format_version": 2}')]),
    (f"{E}::within_3", co, [("min_match=7","min_match=3")]),
    (f"{E}::within_3", co, [("_FEW_ZEROS = 0.75","_FEW_ZEROS = 0.0")]),
    # transcode, cli
    (f"{K}::overlap or own_output", tr, [("out.is_relative_to(real) or real.is_relative_to(out)","out.is_relative_to(real)")]),
    (f"{K}::overlap or own_output", tr, [("out.is_relative_to(real) or real.is_relative_to(out)","real.is_relative_to(out)")]),
    (f"{K}::export_it_again", tr, [("            model_config.pop(QUANTIZATION_CONFIG, None)\n","")]),
    (f"{K}::export_it_again", tr, [("if path.suffix.lower() in files.PICKLE_SUFFIXES:","if False:")]),
    (f"{K}::export_it_again", tr, [("files.check_regular(path, root)\n            except","files.check_regular(path)\n            except")]),
    (f"{K}::export_refuses or row_scales", tr, [("    if rounded:","    if False:")]),
    (f"{K}::memory", tr, [("        entries: dict[str, PackedWeight | Tensor] = {}\n        with","        entries: dict[str, PackedWeight | Tensor] = {}\n        kept = []\n        with"),("_quantize_tensor(shard, name, info, get(name), reasons","_quantize_tensor(shard, name, info, (kept.append(get(name)), kept[-1])[1], reasons")]),
    (f"{K}::keep_the_dtype", tr, [("    dtypes = {name: infos[name].dtype for name in chosen}","    dtypes = {}")]),
    (f"{K}::tied_head", tr, [('    if tied and module == "lm_head":','    if False:')]),
    (f"{K}::goes_away", cli, [("        _silence_stdout()\n","")]),
    (f"{K}::interrupt", cli, [("        return _INTERRUPTED","        return _ERROR")]),
    (f"{K}::one_line", cli, [('    return " ".join(text.split())','    return text')]),
    (f"{K}::unicode", cli, [('            stream.reconfigure(errors="replace")','            pass')]),
    # fuzzing, faults, pickles
    ("test_training.py::forged", tn, [("    if depth > _MAX_DEPTH:\n        # Before","    if False:\n        # Before")]),
    (f"{Z}::spoiled_files", tn, [("REFUSED = (*MALFORMED, ValueError, RuntimeError, OverflowError)","REFUSED = ()")]),
    (f"{Z}::spoiled_files", files, [("    except RecursionError:\n","    except ZeroDivisionError:\n")]),
    (f"{Z}::spoiled_files", ff, [("    if bad:\n        raise CheckpointError(\n            f\"{weight}: expected canonical","    if False:\n        raise CheckpointError(\n            f\"{weight}: expected canonical")]),
    (f"{X}::every_call", files, [("    temporary = _beside(target)\n    try:\n        mode = _fresh_file(temporary)\n        with","    temporary = target\n    try:\n        mode = 0o644\n        with")]),
    (f"{X}::every_call", files, [("    _fsync(target.parent)\n\n\ndef _sort_metadata","\n\ndef _sort_metadata")]),
    (f"{X}::every_call", files, [("    with _naming(path), path.open(\"r+b\") as file:","    with path.open(\"r+b\") as file:")]),
    (f"{X}::two_hundred", tn, [("    set_rng_state(state[\"rng\"])\n","    pass\n")]),
    (f"{N}::no_source", ck, [("    checkpoint = open_checkpoint(path)\n    if model is None:","    import pickle\n    checkpoint = open_checkpoint(path)\n    if model is None:")]),
    (f"{N}::unpickles", ck, [("    checkpoint = open_checkpoint(path)\n    if model is None:","    __import__(\"pickle\").loads(b\"N.\")\n    checkpoint = open_checkpoint(path)\n    if model is None:")]),
]  # fmt: skip

if __name__ == "__main__":
    mutants.MUTANTS[:] = MUTANTS
    sys.exit(mutants.main())

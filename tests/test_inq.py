"""inq.INQ beside every kind of optimizer: frozen weights keep their bits, counts are exact, schedules start afresh,
and a run that is stopped anywhere goes on bit for bit."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import inq_kernels as inq
from inq_kernels.format import frozen_count

FMT = inq.Format(4)
PORTIONS = (0.4, 0.8, 1.0)


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(96, 5)
    )


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 1, 8, 8, generator=generator), torch.randint(5, (16,), generator=generator)


def weights_of(model, run):
    return {name: model.get_submodule(name).weight for name in run.formats}


def snapshot(model, run):
    """What is frozen, and the bits it has."""
    return {name: (run.frozen(name), w.detach().clone()) for name, w in weights_of(model, run).items()}


def assert_unmoved(model, before):
    for name, (frozen, values) in before.items():
        now = model.get_submodule(name).weight.detach()
        assert torch.equal(now[frozen].view(torch.int32), values[frozen].view(torch.int32)), name


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
    "sgd-nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.01, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.01),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, fused=True),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.001, momentum=0.9, weight_decay=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01, weight_decay=0.01),
}


@pytest.mark.parametrize("partition", ["magnitude", "random"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_weights_never_move_and_counts_are_exact(optimizer, partition):
    model, (x, t) = small_net(), batch()
    opt = OPTIMIZERS[optimizer](model.parameters())
    run = inq.INQ(model, opt, FMT, inq.PAPER_PORTIONS[4], partition=partition)
    previous = None
    for portion in run:
        before = snapshot(model, run)
        for name, (frozen, _) in before.items():
            assert int(frozen.sum()) == frozen_count(portion, frozen.numel())
            assert previous is None or not (previous[name][0] & ~frozen).any(), "a frozen weight was re-opened"
        previous = before
        for _ in range(4):
            opt.zero_grad()
            F.cross_entropy(model(x), t).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            opt.step()
            assert_unmoved(model, before)
        if portion < 1:
            moved = [(model.get_submodule(n).weight[~f] != w[~f]).any() for n, (f, w) in before.items()]
            assert all(moved), "the test proves nothing unless the others move"
    for name, w in weights_of(model, run).items():
        assert torch.equal(inq.quantize(w, FMT, run.n1(name)), w)
    assert inq.convert(model, run.formats).modules[0].sqnr_db == float("inf")


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_moves_nothing_frozen_inside_its_closures(line_search):
    model, (x, t) = small_net(), batch()
    opt = torch.optim.LBFGS(model.parameters(), 0.5, max_iter=5, history_size=4, line_search_fn=line_search)
    calls = 0
    run = inq.INQ(model, opt, FMT, PORTIONS)
    for _ in run:
        before = snapshot(model, run)

        def closure(before=before):
            nonlocal calls
            calls += 1
            assert_unmoved(model, before)
            opt.zero_grad()
            loss = F.cross_entropy(model(x), t)
            loss.backward()
            return loss

        for _ in range(3):
            opt.step(closure)
            assert_unmoved(model, before)
    assert calls > 15


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_grad_scaler_autocast_and_accumulation(optimizer):
    model, (x, t) = small_net(), batch()
    opt = OPTIMIZERS[optimizer](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    run = inq.INQ(model, opt, FMT, PORTIONS)
    for _ in run:
        before = snapshot(model, run)
        for step in range(4):
            opt.zero_grad()
            for half in (slice(8), slice(8, 16)):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = F.cross_entropy(model(x[half]).float(), t[half])
                scaler.scale(loss).backward()
                for name, (frozen, _) in before.items():
                    assert not model.get_submodule(name).weight.grad[frozen].any()
            if step == 2:  # an overflow: the scaler must see it and leave the step out
                model[1].weight.grad[0] = float("inf")
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(opt)
            scaler.update()
            assert_unmoved(model, before)
    assert scaler.get_scale() < 2.0**10


def test_frozen_gradients_do_not_count_in_the_clipping_norm():
    model, (x, t) = small_net(), batch()
    opt = torch.optim.SGD(model.parameters(), 0.1)
    run = inq.INQ(model, opt, FMT, (1.0,))
    for _ in run:
        F.cross_entropy(model(x), t).backward()
        quantized = list(weights_of(model, run).values())
        assert nn.utils.get_total_norm([w.grad for w in quantized]) == 0
        opt.zero_grad()
        # An infinite gradient of a frozen weight is no overflow of the training.
        (model[0].weight * float("inf")).sum().backward()
        assert not model[0].weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weight_dtypes(dtype):
    torch.manual_seed(0)
    model = nn.Linear(13, 7, dtype=dtype)
    opt = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    run = inq.INQ(model, opt, inq.Format(3, granularity="channel"), PORTIONS)
    for _ in run:
        frozen, w = run.frozen(model.weight), model.weight.detach().clone()
        model(torch.randn(4, 13, dtype=dtype)).square().sum().backward()
        opt.step()
        assert torch.equal(model.weight[frozen], w[frozen])
    assert torch.equal(inq.unpack(inq.pack(model.weight, run.formats[""], run.n1("")), dtype), model.weight)


@pytest.mark.parametrize("size", [1, 31, 32, 33, 1000])
@pytest.mark.parametrize("bits", inq.PAPER_PORTIONS)
def test_counts_at_odd_sizes(size, bits):
    model = nn.Linear(size, 1, bias=False)
    run = inq.INQ(model, torch.optim.SGD(model.parameters(), 0.1), inq.Format(bits), inq.PAPER_PORTIONS[bits])
    for portion in run:
        frozen = run.frozen("")
        assert int(frozen.sum()) == frozen_count(portion, size)
        report = run.report()[0]
        assert report.frozen == int(frozen.sum()) == report.zeros + sum(report.histogram.values())


def test_the_error_is_the_same_in_pieces(monkeypatch):
    """A layer's report: what is summed a piece at a time, the last one not whole, is what the weights say."""
    torch.manual_seed(0)
    dense = nn.Linear(37, 29, bias=False)
    keep = torch.rand(29, 37) < 0.8
    before = dense.weight.detach().double() * keep
    monkeypatch.setattr("inq_kernels.inq._PIECE", 64)
    run = inq.INQ(dense, torch.optim.SGD(dense.parameters(), 0.1), FMT, PORTIONS, prune_masks={"": keep})
    for _ in run:
        held = run.frozen("") & keep
        signal, noise = (t[held].square().sum() for t in (before, before - dense.weight.detach().double()))
        assert run.report()[0].sqnr_db == pytest.approx(10 * float((signal / noise).log10()), abs=1e-9)


TWENTY_MILLION = [4, 8, 12, 14, 16, 17, 18, 19, 19.5, 20]  # the paper's portions at 2 bits, in millions


@pytest.mark.parametrize("partition", ["magnitude", "random"])
def test_twenty_million_weights_of_one_layer(partition):
    """Beyond torch.quantile's 2^24 elements (mistake 10), with exact counts at every portion and one bit a weight."""
    torch.manual_seed(0)
    model = nn.Linear(5000, 4000, bias=False)
    portions = inq.PAPER_PORTIONS[2] if partition == "magnitude" else (0.3, 1.0)
    counts = TWENTY_MILLION if partition == "magnitude" else [6, 20]
    run = inq.INQ(model, torch.optim.SGD(model.parameters(), 0.1), inq.Format.paper(2), portions, partition)
    for _, millions in zip(run, counts, strict=True):
        assert int(run.frozen("").sum()) == millions * 1_000_000
    assert run.state_dict()["layers"][""]["mask"].numel() == 20_000_000 // 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the same test runs there")
@pytest.mark.parametrize("capturable", [False, True])
def test_on_a_gpu(capturable):
    model, (x, t) = small_net().cuda(), [v.cuda() for v in batch()]
    opt = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1, capturable=capturable)
    run = inq.INQ(model, opt, FMT, PORTIONS)
    for _ in run:
        before = snapshot(model, run)
        for _ in range(3):
            opt.zero_grad()
            F.cross_entropy(model(x), t).backward()
            opt.step()
            assert_unmoved(model, before)
    y = model.eval()(x)
    inq.convert(model, run.formats)
    torch.testing.assert_close(model(x), y)


def test_layers_are_chosen_by_type_and_shared_weights_once():
    tied = nn.Linear(4, 4)
    other = nn.Linear(4, 4)
    other.weight = tied.weight
    model = nn.ModuleDict(
        {
            "bn_looking": nn.Linear(4, 4),
            "conv_looking": nn.BatchNorm2d(4),
            "c1": nn.Conv1d(2, 3, 2),
            "c3": nn.Conv3d(2, 3, 2),
            "up": nn.ConvTranspose2d(2, 3, 2),
            "embedding": nn.Embedding(5, 4),
            "tied": tied,
            "other": other,
            "attention": nn.MultiheadAttention(4, 2),
        }
    )
    run = inq.INQ(model, torch.optim.SGD(model.parameters(), 0.1), FMT)
    assert list(run.formats) == ["bn_looking", "c1", "c3", "tied", "attention.out_proj"]


def test_overrides_and_skip_by_pattern():
    model = small_net()
    wide = inq.Format(5, granularity="channel")
    with torch.no_grad():
        model[5].weight[0] *= 8
    run = inq.INQ(model, torch.optim.SGD(model.parameters(), 0.1), FMT, overrides={"5": wide, "*": FMT}, skip="0")
    assert run.formats == {"3": FMT, "5": wide}
    list(run)
    assert not torch.equal(inq.quantize(model[0].weight, FMT), model[0].weight), "the skipped layer was quantized"
    assert len(run.n1("5").unique()) > 1
    assert len(run.n1("3").unique()) == 1


_lr = torch.optim.lr_scheduler
SCHEDULERS = {
    "step": lambda opt: _lr.StepLR(opt, 2),
    "multistep": lambda opt: _lr.MultiStepLR(opt, [1, 3]),
    "lambda": lambda opt: _lr.LambdaLR(opt, lambda epoch: 0.9**epoch),
    "cosine": lambda opt: _lr.CosineAnnealingLR(opt, 5),
    "onecycle": lambda opt: _lr.OneCycleLR(opt, 0.2, total_steps=6),  # cycles the momentum too
    "cyclic": lambda opt: _lr.CyclicLR(opt, 0.01, 0.2, step_size_up=2),
    "chained": lambda opt: _lr.ChainedScheduler([_lr.ExponentialLR(opt, 0.9), _lr.StepLR(opt, 2)]),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_start_afresh_at_every_portion(kind):
    model = small_net()
    opt = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scheduler = SCHEDULERS[kind](opt)
    run = inq.INQ(model, opt, FMT, PORTIONS, lr_schedulers=scheduler)
    seen = []
    for _ in run:
        seen.append([])
        for _ in range(5):
            seen[-1].append((opt.param_groups[0]["lr"], opt.param_groups[0]["momentum"]))
            opt.step()
            scheduler.step()
    assert len(set(seen[0])) > 1, "the schedule must change something"
    assert seen[0] == seen[1] == seen[2]


def test_plateau_scheduler_and_a_tensor_learning_rate():
    model = small_net()
    opt = torch.optim.Adam(model.parameters(), torch.tensor(0.1), foreach=False)
    rate = opt.param_groups[0]["lr"]
    scheduler = _lr.ReduceLROnPlateau(opt, factor=0.1, patience=0)
    run = inq.INQ(model, opt, FMT, PORTIONS, lr_schedulers=[scheduler])
    for _ in run:
        assert opt.param_groups[0]["lr"] is rate, "a capturable optimizer holds on to the tensor"
        assert float(rate) == pytest.approx(0.1)
        for loss in (1.0, 2.0, 3.0):
            scheduler.step(loss)
        assert float(rate) < 0.1


def test_without_schedulers_the_groups_are_the_users_business():
    model = small_net()
    opt = torch.optim.SGD(model.parameters(), 0.1)
    run = iter(inq.INQ(model, opt, FMT, PORTIONS))
    next(run)
    opt.param_groups[0]["lr"] = 0.01
    next(run)
    assert opt.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize("reset", [False, True])
def test_optimizer_state_is_reset_on_request(reset):
    model, (x, t) = small_net(), batch()
    opt = torch.optim.Adam(model.parameters(), 0.01)
    run = iter(inq.INQ(model, opt, FMT, PORTIONS, reset_optimizer=reset))
    next(run)
    F.cross_entropy(model(x), t).backward()
    opt.step()
    next(run)
    assert bool(opt.state) != reset


def test_prune_masks():
    """Portions are of the kept weights (PAPER.md, DNS + INQ); pruned ones become 0 at once and stay 0."""
    model, (x, t) = small_net(), batch()
    kept = torch.rand(6, 4, 3, 3, generator=torch.Generator().manual_seed(2)) < 0.3
    opt = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
    run = inq.INQ(model, opt, FMT, PORTIONS, prune_masks={"3": kept})
    for portion in run:
        frozen = run.frozen("3")
        assert int(frozen.sum()) == frozen_count(portion, int(kept.sum()))
        assert not (frozen & ~kept).any()
        for _ in range(3):
            opt.zero_grad()
            F.cross_entropy(model(x), t).backward()
            opt.step()
            assert not model[3].weight[~kept].any()


def make(portions=PORTIONS):
    model = small_net()
    opt = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
    scheduler = _lr.OneCycleLR(opt, 0.1, total_steps=6)
    return model, opt, scheduler, inq.INQ(model, opt, FMT, portions, lr_schedulers=scheduler)


def train(model, opt, scheduler, run, step=0, stop_at=None):
    """Four steps a portion; after step ``stop_at``, what a checkpoint holds."""
    x, t = batch()
    for portion in run:
        while step < 4 * (PORTIONS.index(portion) + 1):
            opt.zero_grad()
            F.cross_entropy(model(x), t).backward()
            opt.step()
            scheduler.step()
            step += 1
            if step == stop_at:
                return copy.deepcopy((model.state_dict(), opt.state_dict(), run.state_dict()))
    return None


@pytest.mark.parametrize("stop_at", range(1, 13))
def test_resume_is_bit_exact(stop_at):
    whole = make()
    train(*whole)
    model_state, opt_state, run_state = train(*make(), stop_at=stop_at)
    model, opt, scheduler, run = make()
    model.load_state_dict(model_state)
    opt.load_state_dict(opt_state)
    run.load_state_dict(run_state)
    train(model, opt, scheduler, run, step=stop_at)
    for name, expected in whole[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], expected), name
    assert opt.param_groups[0]["lr"] == whole[1].param_groups[0]["lr"]
    assert str(run.report()) == str(whole[3].report())


def test_state_of_another_run_is_refused_and_changes_nothing():
    *_, run = make()
    next(iter(run))
    state = run.state_dict()
    model, opt, _, other = make(portions=(0.5, 1.0))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"portions: expected \[0.5, 1.0\], .* got \[0.4, 0.8, 1.0\]"):
        other.load_state_dict(state)
    *_, fresh = make()
    for change, message in (
        ({"layers": {}}, "layers: expected"),
        ({"index": 7}, "index: expected"),
        ({"seed": 5}, "seed: expected 0"),
        ({"lr_schedulers": []}, r"lr_schedulers: expected \['OneCycleLR'\], got \[\]"),
        ({"index": True}, "index: expected"),
        ({"in_progress": 1}, "in_progress: expected a bool"),
    ):
        with pytest.raises(ValueError, match=message):
            fresh.load_state_dict({**state, **change})
    with pytest.raises(ValueError, match="without \\['index'\\]"):
        fresh.load_state_dict({k: v for k, v in state.items() if k != "index"})
    layer = {**state["layers"]["3"], "codes": state["layers"]["3"]["codes"][:-1]}
    with pytest.raises(ValueError, match="layer '3': codes: expected torch.uint8"):
        fresh.load_state_dict({**state, "layers": {**state["layers"], "3": layer}})
    assert fresh.portion == other.portion == 0
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_loop_that_was_left_goes_on_with_its_portion():
    *_, run = make()
    for _ in run:
        break
    frozen = run.frozen("3")
    seen = []
    for portion in run:
        seen.append(portion)
        if portion == PORTIONS[0]:
            assert torch.equal(run.frozen("3"), frozen)
    assert seen == list(PORTIONS)
    assert list(run) == []


def test_loading_an_older_checkpoint_into_the_model_cannot_thaw_it():
    model, opt, _, run = make()
    old = copy.deepcopy(model.state_dict())
    turns = iter(run)
    next(turns)
    before = snapshot(model, run)
    model.load_state_dict(old)
    next(turns)
    assert_unmoved(model, before)


def test_close_takes_the_hooks_off():
    model, opt, _, run = make()
    next(iter(run))
    run.close()
    frozen, w = snapshot(model, run)["3"]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    assert (model[3].weight[frozen] != w[frozen]).all()


def test_nan_names_the_layer_and_leaves_all_layers_alone():
    model, _, _, run = make()
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = float("nan")
        model[3].weight[0, 0, 0, 1] = float("inf")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="layer '3': expected finite values, got 1 NaN and 1 Inf of 216"):
        next(iter(run))
    assert run.portion == 0
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items() if k != "3.weight")


def test_a_layer_of_zeros_is_refused():
    model, _, _, run = make()
    nn.init.zeros_(model[5].weight)
    with pytest.raises(ValueError, match="layer '5': expected some nonzero values to choose n1 from, got 480 zeros"):
        next(iter(run))


def test_kept_weights_that_are_all_zero_are_refused():
    model = nn.Linear(4, 4)
    kept = torch.zeros(4, 4, dtype=torch.bool)
    kept[0, 0] = True
    nn.init.zeros_(model.weight[:1])
    run = inq.INQ(model, torch.optim.SGD(model.parameters(), 0.1), FMT, prune_masks={"": kept})
    with pytest.raises(ValueError, match="expected some nonzero values to choose n1 from, got 1 zeros"):
        next(iter(run))


def test_a_second_run_on_the_same_weights_is_refused_until_the_first_is_closed():
    model, opt, _, run = make()
    with pytest.raises(ValueError, match=r"layer '0': .* got one of another inq.INQ: close\(\) it first"):
        inq.INQ(model, opt, FMT)
    list(run)
    run.close()
    second = inq.INQ(model, opt, inq.Format(2), (0.5, 1.0))
    (x, t), before = batch(), model[3].weight.detach().clone()
    next(iter(second))
    F.cross_entropy(model(x), t).backward()
    opt.step()
    assert (model[3].weight != before)[~second.frozen("3")].any()


def test_closing_a_run_again_takes_nothing_from_the_next_one():
    """The masks that the optimizer holds are the next run's by then, and weight decay would move what it froze."""
    model = small_net()
    opt = inq.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    run = inq.INQ(model, opt, FMT)
    run.close()
    second = inq.INQ(model, opt, FMT, (0.5, 1.0))
    next(iter(second))
    before, frozen = model[3].weight.detach().clone(), second.frozen("3")
    run.close()
    x, t = batch()
    F.cross_entropy(model(x), t).backward()
    opt.step()
    assert torch.equal(model[3].weight[frozen], before[frozen])
    with pytest.raises(ValueError, match="got one of another inq.INQ"):
        inq.INQ(model, opt, FMT)


@pytest.mark.parametrize("how", ["assign", "module"])
def test_weights_that_were_replaced_are_noticed(how):
    """The run would go on freezing Parameters that are the model's no more."""
    model, _, _, run = make()
    next(iter(run))
    if how == "assign":
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    else:
        model[0] = nn.Conv2d(1, 4, 3)
    for call in (lambda: next(iter(run)) and list(run), run.report, run.state_dict, lambda: run.formats):
        with pytest.raises(ValueError, match="layer '0': expected the Parameter of when the run was made, got another"):
            call()


def test_a_layer_that_is_unfrozen_later_gets_its_gradient_masked():
    model, (x, t) = small_net(), batch()
    model[3].weight.requires_grad_(False)
    run = iter(r := inq.INQ(model, torch.optim.SGD(model.parameters(), 0.1), FMT, PORTIONS))
    next(run)
    model[3].weight.requires_grad_(True)
    next(run)
    F.cross_entropy(model(x), t).backward()
    assert not model[3].weight.grad[r.frozen("3")].any()
    assert model[3].weight.grad[~r.frozen("3")].any()


def test_hooks_of_the_user_see_the_weights_after_they_were_restored():
    model, (x, t) = small_net(), batch()
    opt = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    seen = []
    opt.register_step_post_hook(lambda *_: seen.append(model[3].weight.detach().clone()))
    run = inq.INQ(model, opt, FMT, PORTIONS)
    for _ in run:
        frozen, w = snapshot(model, run)["3"]
        F.cross_entropy(model(x), t).backward()
        opt.step()
        assert torch.equal(seen[-1][frozen], w[frozen])


def test_an_expanded_weight_is_refused():
    model = nn.Linear(16, 4)
    model.weight = nn.Parameter(torch.randn(4, 1).expand(4, 16))
    with pytest.raises(ValueError, match="expected a weight with memory of its own for each value"):
        inq.INQ(model, torch.optim.SGD(model.parameters(), 0.1), FMT)


def test_the_report_of_a_layer_worked_by_hand():
    """4 bits, n1 = 0: levels 1, ½, ¼, ⅛. Frozen first: 1.0 → 1, −0.8 → −1; then 0.3 → ¼, 0.05 → 0."""
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.05, -0.8, 0.3]]))
    run = inq.INQ(model, torch.optim.SGD(model.parameters(), 0.1), inq.Format.paper(4), (0.5, 1.0))
    assert (run.report()[0].n1, run.report()[0].frozen) == (None, 0)
    turns = iter(run)
    next(turns)
    row = run.report()[0]
    assert (row.name, row.shape, row.portion, row.frozen, row.numel) == ("", (1, 4), 0.5, 2, 4)
    assert (row.n1, row.zeros, row.histogram) == ((0, 0), 0, {0: 2})
    assert row.sqnr_db == pytest.approx(10 * math.log10((1.0 + 0.64) / 0.04), abs=1e-4)
    next(turns)
    row = run.report()[0]
    assert (row.zeros, row.histogram) == (1, {0: 2, -2: 1})
    noise = 0.04 + 0.05**2 + 0.05**2
    assert row.sqnr_db == pytest.approx(10 * math.log10((1.0 + 0.64 + 0.09 + 0.0025) / noise), abs=1e-4)
    assert "2^0:2 2^-2:1" in str(run.report())


def test_a_weight_outside_the_optimizer_is_warned_about():
    model = small_net()
    with pytest.warns(UserWarning, match=r"the weights of \['5'\] are not among its parameters"):
        inq.INQ(model, torch.optim.SGD([*model[0].parameters(), *model[3].parameters()], 0.1), FMT)


def weight_norm_net():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))


BAD_ARGUMENTS = {
    "optimizer": (dict(optimizer=object()), TypeError, "optimizer: expected a torch.optim.Optimizer, got object"),
    "format": (dict(fmt=4), TypeError, "fmt: expected an inq.Format, got 4"),
    "override": (dict(overrides={"0": 5}), TypeError, r"overrides\['0'\]: expected an inq.Format"),
    "override-typo": (dict(overrides={"fc*": FMT}), ValueError, r"overrides: expected a pattern .* got 'fc\*'"),
    "skip-typo": (dict(skip=("fc",)), ValueError, "skip: expected a pattern that matches a module, got 'fc'"),
    "skip-all": (dict(skip="*"), ValueError, "expected at least one"),
    "partition": (dict(partition="largest"), ValueError, "partition: expected one of"),
    "portions-order": (dict(portions=(0.5, 0.4, 1.0)), ValueError, "portions: expected increasing"),
    "portions-end": (dict(portions=(0.5, 0.9)), ValueError, "the last 1, got"),
    "portions-empty": (dict(portions=()), ValueError, "portions: expected increasing"),
    "portions-range": (dict(portions=(0.5, 1.5)), ValueError, r"portions: expected a number in \[0, 1\], got 1.5"),
    "portions-type": (dict(portions=("half", 1.0)), TypeError, "portions: expected a number"),
    "seed": (dict(seed=0.5), TypeError, "seed: expected an int, got 0.5"),
    "scheduler": (dict(lr_schedulers=3), TypeError, "lr_schedulers: expected torch LR schedulers, got int"),
    "mask-name": (
        dict(prune_masks={"1": torch.ones(4, dtype=torch.bool)}), ValueError, "prune_masks: expected names of"
    ),
    "mask-shape": (
        dict(prune_masks={"5": torch.ones(4, dtype=torch.bool)}), ValueError, r"bool tensor of shape \[5, 96\]"
    ),
    "mask-dtype": (dict(prune_masks={"5": torch.ones(5, 96)}), ValueError, "got torch.float32"),
    "mask-empty": (dict(prune_masks={"5": torch.zeros(5, 96, dtype=torch.bool)}), ValueError, "got none"),
    "no-layers": (dict(model=nn.BatchNorm2d(3)), ValueError, "expected at least one"),
    "computed": (dict(model=weight_norm_net()), ValueError, "layer '0': expected a parameter, got a value computed"),
    "lazy": (dict(model=nn.LazyLinear(3)), ValueError, "expected an initialised weight"),
    "meta": (dict(model=nn.Linear(3, 3, device="meta")), ValueError, "on a real device, got .* on meta"),
    "complex": (dict(model=nn.Linear(3, 3, dtype=torch.complex64)), ValueError, "got torch.complex64"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature", "ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_have_one_clear_error_and_leave_no_hooks(case):
    arguments, kind, message = BAD_ARGUMENTS[case]
    model = small_net()
    opt = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(kind, match=message):
        inq.INQ(**{"model": model, "optimizer": opt, "fmt": FMT, **arguments})
    assert not opt._optimizer_step_post_hooks
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())


def test_unknown_weights_are_named():
    model, _, _, run = make()
    with pytest.raises(KeyError, match="expected a quantized weight or the name of its module, got 'fc'"):
        run.frozen("fc")
    with pytest.raises(KeyError, match=r"got a tensor of shape \[4\]"):
        run.n1(model[0].bias)

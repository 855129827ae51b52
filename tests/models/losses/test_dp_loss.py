"""The diagonality-preserving loss: its values, and that it reaches training."""
import copy
import math
import warnings
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, init_default_scope
from torch.nn.parallel import DistributedDataParallel

from builders import ARCH, BATCHES, leave_process_group, randomise
from mmlavit import DiagonalityPreservingLoss, LaViT
from mmlavit.analysis import observe_layers
from mmlavit.models.layers.attention import LessAttention
from mmlavit.models.layers.grid import Grids
from mmlavit.models.layers.scores import (FactoredScores, LayerScores,
                                          MaterialisedScores)

ROOT = Path(__file__).parents[3]


def of(form: str, s, **kwargs) -> float:
    loss = DiagonalityPreservingLoss(form=form, **kwargs)
    return loss.on_scores(torch.tensor(s)[None, None].double()).item()


def circulant(*row) -> list:
    """A matrix, symmetric if the row is, and still so after a softmax."""
    return [list(row[-i:] + row[:-i]) for i in range(len(row))]


class Model(BaseModel):
    """The least that an OpenMMLab model is."""

    def __init__(self, **kwargs):
        super().__init__()
        self.backbone = randomise(
            LaViT(arch=ARCH, pretrain_img_size=64, **kwargs))

    def loss(self, inputs):
        return dict(loss_task=self.backbone(inputs)[-1].square().mean())

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return self.loss(inputs) if mode == 'loss' else self.backbone(inputs)


def test_bounded_form_of_a_hand_computed_example():
    # softmax rows (.7, .3) and (.6, .4): each row differs by |.3 - .6| from its
    # column, and .6 exceeds the diagonal's .4 by .2
    s = [[math.log(.7), math.log(.3)], [math.log(.6), math.log(.4)]]
    assert of('bounded', s) == pytest.approx((.3 + .3 + .2) / 2)
    assert of('bounded', s, symmetry_weight=0.) == pytest.approx(.2 / 2)
    assert of('bounded', s, diagonal_weight=0.) == pytest.approx(.6 / 2)
    assert of('bounded', s, diagonal_weight=3) == pytest.approx((.6 + .6) / 2)


def test_margin_of_a_hand_computed_example():
    # by the mean entry, 1/2: .3 - .7 + .5 and .6 - .4 + .5
    s = [[math.log(.7), math.log(.3)], [math.log(.6), math.log(.4)]]
    assert of('bounded', s, margin=1.) == pytest.approx(
        (.3 + .3 + .1 + .7) / 2)
    # Only a margin tells the uniform map from one with a dominant diagonal.
    uniform = [[0.] * 4] * 4
    assert of('bounded', uniform) == pytest.approx(0)
    assert of('bounded', uniform, margin=1.) == pytest.approx(3 / 4)
    assert of('bounded', circulant(5., 0., 0., 0.), margin=1.) == (
        pytest.approx(0, abs=1e-12))


def test_paper_form_of_a_hand_computed_example():
    # |2 - 4| twice; (2 - 1) + (4 - 3)
    s = [[1., 2.], [4., 3.]]
    assert of('paper', s) == pytest.approx(4 + 2)
    assert of('paper', s, symmetry_weight=.5, diagonal_weight=2.) == (
        pytest.approx(2 + 4))


def test_bounded_is_zero_where_both_conditions_hold_and_grows_with_violation():
    assert of('bounded', circulant(2., 0., 0.)) == pytest.approx(0, abs=1e-12)
    little = of('bounded', circulant(0., .5, .5))  # symmetric, no diagonal
    more = of('bounded', circulant(0., 1., 1.))
    assert 0 < little < more
    little = of('bounded', circulant(2., .5, 0.))  # a diagonal, not symmetric
    more = of('bounded', circulant(2., 1.5, 0.))
    assert 0 < little < more
    assert more < of('bounded', circulant(0., 1.5, 0.)) <= 3


def test_paper_prefers_the_dominant_diagonal():
    assert of('paper', circulant(2., 0., 0.)) < of('paper', circulant(
        1., 0., 0.)) < 0 < of('paper', circulant(0., 1., 1.))


def test_forms_reduce_heads_images_layers_and_stages_as_documented():
    s = torch.tensor([circulant(0., 1., 1.), circulant(2., 0., 0.)]).double()
    mean = (of('paper', s[0].tolist()) + of('paper', s[1].tolist())) / 2
    for x in (s[:, None], s[None]):  # two images, two heads
        loss = DiagonalityPreservingLoss(form='paper')
        assert loss.on_scores(x).item() == pytest.approx(mean)
    stages = [[], [torch.tensor(1.), torch.tensor(3.)], [torch.tensor(6.)]]
    for form, expected in (('paper', 10), ('bounded', (2 + 6) / 2)):
        loss = DiagonalityPreservingLoss(form=form, loss_weight=.5)
        loss.hold(stages)
        assert loss.take().item() == pytest.approx(expected / 2)
        assert loss.take() is None


@pytest.mark.parametrize('grid, ratio', [((4, 6), 2), ((5, 7), 2), ((3, 3), 4),
                                         ((3, 2), 1)])
def test_scores_between_regions_are_means_over_the_keys_regions(grid, ratio):
    h, w = (math.ceil(size / ratio) for size in grid)
    q = torch.randn(2, grid[0] * grid[1], 6, dtype=torch.double)
    k = torch.randn(2, h * w, 6, dtype=torch.double)
    scores = FactoredScores(q, k, 2)
    images = scores.dense().unflatten(2, grid)
    expected = torch.stack([
        images[:, :, y * ratio:(y + 1) * ratio,
               x * ratio:(x + 1) * ratio].mean((2, 3))
        for y in range(h) for x in range(w)
    ], 2)
    for part in (scores, MaterialisedScores(scores.dense())):
        actual = part.between_regions(Grids(grid, ratio)).dense()
        torch.testing.assert_close(actual, expected)
    twice = LayerScores(scores, scores).between_regions(Grids(grid, ratio)).dense()
    torch.testing.assert_close(twice, 2 * expected)


@pytest.mark.parametrize('kwargs', [
    {}, dict(form='bounded'), dict(form='paper'), dict(form='bounded', layers='all')])
def test_all_ways_to_compute_scores_give_one_loss(kwargs, device):
    x, values = torch.randn(2, 3, 72, 100, dtype=torch.double, device=device), []
    for path in ('auto', 'factored', 'materialised'):
        model = Model(dp_loss=kwargs, score_path=path).double().to(device)
        losses = model(x, mode='loss')
        losses['loss_dp'].backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        values.append([losses['loss_dp'].detach(), *grads])
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=1e-8, atol=1e-10)


def test_preserve_of_a_hand_computed_example():
    """Against an inherited map: the first of two rows asks for more, by .1."""
    def rows(*pairs):
        return torch.tensor([[[[math.log(a), math.log(b)] for a, b in pairs]]]).double()

    # |.6 - .4| in each row; .6 exceeds the second row's diagonal by .2: a mean of .1
    here, uniform = rows((.4, .6), (.4, .6)), rows((.5, .5), (.5, .5))
    loss = DiagonalityPreservingLoss(symmetry_weight=2., diagonal_weight=3.)
    # row 0: .6 over its diagonal .4; row 1: nothing over .6
    assert loss.lost(here, uniform).item() == pytest.approx(2 * .2 + 3 * .1)
    # What is no worse than what it comes from has no loss, however bad it is.
    assert loss.lost(here, here) == 0
    assert loss.lost(uniform, here) == 0
    worse = rows((.3, .7), (.4, .6))  # |.7 - .4|; .4 over .3
    assert loss.lost(worse, here).item() == pytest.approx(
        2 * (.3 - .2) + 3 * (.2 - .1))


def test_preserve_reaches_theta_and_psi_alone(device):
    model = Model(dp_loss=dict()).to(device)
    model(torch.randn(2, 3, 64, 64, device=device), mode='loss')['loss_dp'].backward()
    reached = {name for name, p in model.named_parameters()
               if p.grad is not None and p.grad.any()}
    learned = {name for name, _ in model.named_parameters()
               if 'theta' in name or 'psi' in name}
    assert reached and reached <= learned
    # Of every layer that lost something; a layer on random weights does.
    assert len(reached) >= len(learned) / 2


def test_preserve_repairs_a_mixing_that_lost_the_diagonal():
    """Theta and Psi alone are trained, on what a fresh layer would keep."""
    model, values = minimise('preserve', torch.optim.AdamW, 2e-2, 60)
    assert values[0] > 1e-4 and values[-1] < .2 * values[0]
    before = dict(Model(dp_loss=dict()).named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != (
            'theta' in name or 'psi' in name), name


def test_large_grids_are_compared_on_larger_regions():
    """30 x 20 keys on regions of 3 x 3: means of all their pairs."""
    grids = Grids((60, 40), 2)
    q = torch.randn(1, 2400, 4, dtype=torch.double)
    k = torch.randn(1, 600, 4, dtype=torch.double)
    s = FactoredScores(q, k, 2)
    pairs = s.dense().unflatten(2, (60, 40)).unflatten(4, (30, 20))
    expected = torch.stack([
        torch.stack([
            pairs[:, :, 6 * y:6 * y + 6, 6 * x:6 * x + 6, 3 * v:3 * v + 3,
                  3 * u:3 * u + 3].mean((2, 3, 4, 5))
            for v in range(10) for u in range(7)
        ], -1) for y in range(10) for x in range(7)
    ], -2)
    for part in (s, MaterialisedScores(s.dense())):
        actual = DiagonalityPreservingLoss.region_scores(
            LayerScores(own=part), grids)
        torch.testing.assert_close(actual, expected)


def test_gradients_reach_theta_psi_and_the_vanilla_layers_q_and_k():
    model = Model(dp_loss=dict(form='bounded'))
    model(torch.randn(2, 3, 64, 64), mode='loss')['loss_dp'].backward()
    for stage in model.backbone.stages:
        blocks = list(stage.blocks)
        for block, successor in zip(blocks, blocks[1:] + [None]):
            attn = block.attn
            if isinstance(attn, LessAttention):
                assert attn.theta.weight.grad.abs().max() > 0
                assert attn.psi.weight.grad.abs().max() > 0
            elif isinstance(getattr(successor, 'attn', None), LessAttention):
                assert attn.q.weight.grad.abs().max() > 0
                assert attn.kv.weight.grad.chunk(2)[0].abs().max() > 0
    # The values of the last layer only reach the output.
    assert model.backbone.stages[-1].blocks[-1].attn.v.weight.grad is None


def test_which_layers():
    is_la = [False, True, False, True]
    select = {
        layers: DiagonalityPreservingLoss('bounded', layers=layers).select(is_la)
        for layers in ('la', 'all', (0, 3))
    }
    assert select == {'la': is_la, 'all': [True] * 4,
                      (0, 3): [True, False, False, True]}
    stages = Model(dp_loss=dict(form='bounded', layers=[2, 8])).backbone.stages
    flags = [layer.dp_loss for stage in stages for layer in stage.layers]
    assert [i for i, flag in enumerate(flags) if flag] == [2, 8]


def minimise(form: str, optimizer: type, lr: float, steps: int) -> tuple:
    """The loss alone, its values and the model after it."""
    model = Model(dp_loss=dict(form=form, loss_weight=1.))
    optimizer = optimizer(model.parameters(), lr=lr)
    x, values = torch.randn(2, 3, 64, 64), []
    for _ in range(steps):
        loss = model(x, mode='loss')['loss_dp']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return model, values


def test_bounded_cannot_diverge():
    """Finite and below 3 even with steps that are far too large."""
    model, values = minimise('bounded', torch.optim.SGD, 10., 40)
    assert all(0 <= value <= 3 for value in values)
    assert all(p.isfinite().all() for p in model.parameters())
    _, values = minimise('bounded', torch.optim.AdamW, 1e-3, 20)
    assert values[-1] < .5 * values[0]


def test_paper_form_is_unbounded_below_and_the_others_are_not():
    """Why it is not the default."""
    largest = [circulant(size, 0., 0.) for size in (1., 1e3, 1e6)]
    first, second, third = (of('paper', s) for s in largest)
    assert second == pytest.approx(1e3 * first) and third < 0
    assert third == pytest.approx(1e6 * first)
    assert all(0 <= of('bounded', s) <= 3 for s in largest)


def test_costs_nothing_at_test_time(monkeypatch):
    model = Model(dp_loss=dict())
    x = torch.randn(1, 3, 64, 64)
    monkeypatch.setattr(DiagonalityPreservingLoss, 'forward',
                        lambda *args: pytest.fail('computed'))
    model.eval()(x)
    with torch.no_grad():
        model.train()(x)
    assert model.backbone.dp_loss.take() is None
    assert not list(model.backbone.dp_loss.parameters())
    assert set(model.state_dict()) == set(Model().state_dict())


def test_off_by_default_and_in_frozen_stages():
    x = torch.randn(1, 3, 64, 64)
    assert set(Model()(x, mode='loss')) == {'loss_task'}
    assert set(Model(dp_loss=dict(), frozen_stages=3)(x, mode='loss')) == {
        'loss_task'}


def test_models_may_be_copied_between_forward_and_loss():
    model = Model(dp_loss=dict())
    x = torch.randn(1, 3, 64, 64)
    model.backbone(x)
    assert copy.deepcopy(model).backbone.dp_loss.take() is None
    assert 'loss_dp' in copy.deepcopy(model)(x, mode='loss')


@pytest.mark.parametrize('through_call', [False, True])
def test_a_model_around_a_model_has_each_forwards_loss_once(through_call):
    """As in semi-supervised detectors, which call ``student.loss`` twice."""

    class Outer(BaseModel):

        def __init__(self):
            super().__init__()
            self.student = Model(dp_loss=dict())

        def forward(self, inputs, data_samples=None, mode='tensor'):
            if through_call:
                return self.student(inputs, mode='loss')
            self.student.loss(inputs.flip(3))
            return self.student.loss(inputs)

    x = torch.randn(1, 3, 64, 64)
    model = Outer()
    expected = model.student(x, mode='loss')['loss_dp']
    if not through_call:
        expected = expected + model.student(x.flip(3), mode='loss')['loss_dp']
    for _ in range(2):
        torch.testing.assert_close(model(x)['loss_dp'], expected)


def test_without_a_model_the_last_forward_counts_and_no_graph_piles_up():
    backbone = Model(dp_loss=dict()).backbone
    x = torch.randn(1, 3, 64, 64)
    backbone(x.flip(3))
    backbone(x)
    assert len(backbone.dp_loss.values) == 1
    once = Model(dp_loss=dict())(x, mode='loss')['loss_dp']
    torch.testing.assert_close(backbone.dp_loss.take(), once)


def test_a_loss_that_reaches_no_training_is_said():
    model = LaViT(arch=ARCH, pretrain_img_size=64, dp_loss=dict()).train()
    x = torch.rand(1, 3, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for _ in range(2):
            model(x)
            model.dp_loss.take()
        model(x)
        with pytest.raises(UserWarning, match='reached no training loss'):
            model(x)


def test_a_forward_that_returns_no_losses_leaves_the_loss_to_be_taken():
    model = MODELS.build(Config(dict(
        type='mmpretrain.ImageClassifier',
        data_preprocessor=dict(type='mmpretrain.ClsDataPreprocessor'),
        backbone=dict(type='LaViT', arch=ARCH, pretrain_img_size=64, dp_loss=dict(),
                      out_indices=(3, )),
        neck=dict(type='mmpretrain.GlobalAveragePooling'),
        head=dict(type='mmpretrain.LinearClsHead', num_classes=10, in_channels=32))))
    randomise(model).train()
    batch = BATCHES['mmpretrain'](model, (64, 64))
    expected = model(**batch, mode='loss')['loss_dp']
    model(batch['inputs'], mode='tensor')
    assert torch.equal(model.backbone.dp_loss.take(), expected)


@pytest.mark.parametrize('dp_loss', [None, dict()])
def test_parts_of_a_model_may_be_taken_away(dp_loss):
    model = Model(dp_loss=dp_loss)
    for remove in (lambda: setattr(model, 'backbone', None),
                   lambda: model.add_module('neck', None),
                   lambda: model.register_module('neck', None)):
        remove()
    assert model.backbone is None and model.neck is None


def test_warm_up_follows_the_runners_iteration():
    x, values = torch.randn(1, 3, 64, 64), []
    model = Model(dp_loss=dict(warmup_iters=10))
    hub = MessageHub.get_current_instance()
    try:
        for iteration in (4, 9, 500):
            hub.update_info('iter', iteration)
            values.append(model(x, mode='loss')['loss_dp'].item())
    finally:
        hub.runtime_info.pop('iter')
    full = Model(dp_loss=dict())(x, mode='loss')['loss_dp'].item()
    assert values == pytest.approx([full * .5, full, full])


def test_accumulated_and_checkpointed_gradients_are_the_same(device):
    x = torch.randn(4, 3, 64, 64, dtype=torch.double, device=device)
    grads = []
    for with_cp, parts in ((False, 1), (True, 1), (False, 2)):
        model = Model(dp_loss=dict(), with_cp=with_cp).double().to(device)
        optim_wrapper = OptimWrapper(
            torch.optim.SGD(model.parameters(), lr=1e-3),
            accumulative_counts=parts)
        for part in x.chunk(parts):
            log = model.train_step(
                dict(inputs=part, data_samples=None), optim_wrapper)
            assert log['loss'] == log['loss_task'] + log['loss_dp']
        grads.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grads[2], grads[0], rtol=1e-9, atol=1e-12)


def ddp_worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        'gloo', f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    x = torch.load(f'{folder}/x.pt')
    # Parameters that only the DP loss reaches must not count as unused.
    ddp = DistributedDataParallel(
        Model(dp_loss=dict()).double(), find_unused_parameters=True)
    sum(ddp(x[rank::2], mode='loss').values()).backward()
    if rank == 0:
        torch.save([p.grad for p in ddp.parameters()], f'{folder}/grads.pt')
    del ddp
    leave_process_group()


def test_two_processes_give_the_gradients_of_one(tmp_path, free_port):
    x = torch.randn(4, 3, 64, 96, dtype=torch.double)
    torch.save(x, tmp_path / 'x.pt')
    mp.spawn(ddp_worker, (free_port, str(tmp_path)), nprocs=2)
    model = Model(dp_loss=dict()).double()
    losses = model(x, mode='loss')
    assert losses['loss_dp'] > 0
    sum(losses.values()).backward()
    for p, grad in zip(model.parameters(), torch.load(tmp_path / 'grads.pt')):
        if p.grad is not None:  # outputs that the toy task does not read
            torch.testing.assert_close(grad, p.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('name', [
    'lavit_t_in1k', 'retinanet_lavit_t_coco', 'semantic_fpn_lavit_t_ade20k'
])
@pytest.mark.parametrize('amp', [False, True])
def test_total_gradient_is_task_plus_dp_in_each_toolbox(name, amp, device):
    config = Config.fromfile(ROOT / f'configs/{name}.py')
    init_default_scope(config.default_scope)
    config.model.backbone.update(
        init_cfg=None, arch=ARCH, drop_path_rate=0., pretrain_img_size=64,
        dp_loss=dict(form='bounded', loss_weight=5.))
    widths = ARCH['embed_dims']
    if config.default_scope == 'mmpretrain':
        config.model.head.in_channels = widths[-1]
        config.model.train_cfg = None  # mixup draws random numbers
    else:
        config.model.neck.in_channels = [
            widths[i] for i in config.model.backbone.get(
                'out_indices', (0, 1, 2, 3))]
        config.model.neck.out_channels = 8  # bfloat16 is slow on most CPUs
    if config.default_scope == 'mmseg':
        config.model.data_preprocessor.size = (96, 128)
        config.model.decode_head.update(
            in_channels=[8] * 4, channels=8, dropout_ratio=0.,
            norm_cfg=dict(type='BN'))
    elif config.default_scope == 'mmdet':
        config.model.bbox_head.update(in_channels=8, feat_channels=8)
    model = MODELS.build(config.model).train()
    model.init_weights()
    randomise(model.backbone)
    model.to(device)
    batch = BATCHES[config.default_scope](model)

    def gradients(part: str) -> torch.Tensor:
        model.zero_grad()
        layers = []
        with torch.autocast(device, torch.bfloat16, enabled=amp), (
                observe_layers(model, layers.append)):
            losses = model(**batch, mode='loss')
        total, log = model.parse_losses(losses)
        assert losses['loss_dp'].dtype == torch.float32
        # Independently of the loss's own code, by its documented formula.
        stages = {}
        for layer in layers:
            if layer.kind == 'LA':
                a = layer.region_scores().softmax(-1)
                excess = (a - a.diagonal(dim1=2, dim2=3)[..., None]).clamp(min=0)
                value = ((a - a.mT).abs() + excess).sum(-1).mean()
                stages.setdefault(layer.stage, []).append(value)
        dp = 5 * torch.stack(
            [torch.stack(values).mean() for values in stages.values()]).mean()
        torch.testing.assert_close(log['loss_dp'], dp)
        task = sum(value if torch.is_tensor(value) else sum(value)
                   for name, value in losses.items()
                   if 'loss' in name and name != 'loss_dp')
        torch.testing.assert_close(log['loss'], task + dp)
        # As the gradient scaler of float16 does it.
        (dict(total=total, dp=dp, task=task)[part] * 8).backward()
        return torch.cat([
            (torch.zeros_like(p) if p.grad is None else p.grad).flatten() / 8
            for p in model.parameters()])

    task, dp, total = map(gradients, ('task', 'dp', 'total'))
    assert dp.norm() > 1e-3 * task.norm()
    tolerance = .05 if amp else 1e-4  # bfloat16 has 8 bits
    assert (total - task - dp).norm() < tolerance * dp.norm() + (
        tolerance * 1e-2 * task.norm())


@pytest.mark.parametrize('kwargs, error, words', [
    (dict(form='sum'), ValueError, ("form='sum'", "'bounded'")),
    (dict(loss_weight=-1), ValueError, ('loss_weight=-1', 'at least 0')),
    (dict(loss_weight='1'), TypeError, ("loss_weight='1'", 'number')),
    (dict(symmetry_weight=None), TypeError, ('symmetry_weight=None', )),
    (dict(diagonal_weight=math.nan), ValueError, ('diagonal_weight=nan', )),
    (dict(warmup_iters=1.5), TypeError, ('warmup_iters=1.5', 'integer')),
    (dict(margin=-1.), ValueError, ('margin=-1.0', 'at least 0')),
    (dict(margin=1., form='paper'), ValueError, ('margin=1.0', 'paper')),
    (dict(layers='va'), ValueError, ("layers='va'", "'la', 'all'")),
    (dict(layers=3), TypeError, ('layers=3', 'sequence')),
    (dict(layers=[9]), ValueError, ('layers=(9,)', '0 to 8')),
    (dict(layers=[]), ValueError, ('layers=()', '0 to 8')),
    (dict(layers='all'), ValueError, ("layers='all'", "form='bounded'")),
    (dict(layers=[2, 3]), ValueError, ('layers=(2, 3)', '[3, 5, 6, 7, 8]')),
])
def test_bad_arguments_are_named(kwargs, error, words):
    with pytest.raises(error) as info:
        LaViT(arch=ARCH, dp_loss=kwargs)
    assert all(word in str(info.value) for word in words)


def test_without_less_attention_the_default_layers_are_refused():
    with pytest.raises(ValueError, match='dp_loss=None'):
        LaViT(arch=ARCH, num_va_layers=ARCH['depths'], dp_loss=dict())

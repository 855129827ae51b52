"""Class activation maps against what they are by formula."""
import pytest
import torch
from mmengine.config import Config
from torch import nn

from builders import digits_config, randomise
from mmlavit.analysis.building import build_model
from mmlavit.analysis.cam import anchor_scores, class_scores, hires_cam

BACKBONE = dict(
    type='LaViT',
    arch=dict(embed_dims=(8, 16), depths=(2, 1), num_heads=(1, 2),
              num_va_layers=(1, 0)),
    sr_ratios=(8, 4),
    pretrain_img_size=64,
    out_indices=(0, 1))


def classifier(tmp_path, out_indices=(1, )) -> nn.Module:
    config = digits_config(tmp_path)
    config.model.backbone = dict(BACKBONE, out_indices=out_indices)
    config.model.head.in_channels = 16
    return randomise(build_model(config)).eval()


def segmentor() -> nn.Module:
    head = dict(type='FPNHead', in_channels=[8, 8], in_index=[0, 1],
                feature_strides=[4, 8], channels=8, num_classes=5, align_corners=False)
    return randomise(build_model(Config(dict(
        default_scope='mmseg', model=dict(
            type='EncoderDecoder', backbone=BACKBONE, decode_head=head,
            neck=dict(type='FPN', in_channels=[8, 16], out_channels=8, num_outs=2),
            test_cfg=dict(mode='whole')))))).eval()


def detector(**head) -> nn.Module:
    head = dict(dict(
        type='RetinaHead', num_classes=3, in_channels=8, feat_channels=8,
        stacked_convs=1,
        anchor_generator=dict(
            type='AnchorGenerator', octave_base_scale=4, scales_per_octave=1,
            ratios=[.5, 1.], strides=[4, 8])), **head)
    model = build_model(Config(dict(
        default_scope='mmdet', model=dict(
            type='RetinaNet', backbone=BACKBONE, bbox_head=head,
            neck=dict(type='FPN', in_channels=[8, 16], out_channels=8, num_outs=2),
            test_cfg=dict(nms_pre=10, score_thr=0., max_per_img=5,
                          nms=dict(type='nms', iou_threshold=.5))))))
    return randomise(model, std=.1).eval()


def test_of_a_linear_classifier_is_the_sum_by_its_weights(tmp_path):
    """Behind global average pooling it is CAM (arXiv 1512.04150)."""
    model, images = classifier(tmp_path), torch.randn(2, 3, 48, 64)
    model.requires_grad_(False)
    maps, = model.backbone(images)
    every = torch.einsum('kc,bchw->bkhw', model.head.fc.weight, maps).relu()
    # Of classes whose map is not 0 everywhere, as random weights leave some.
    chosen = every.amax((2, 3)).argmax(1).tolist()
    expected = every[[0, 1], chosen]
    assert expected.amax((1, 2)).min() > 0
    cams, categories, scores = hires_cam(model, images, chosen)
    torch.testing.assert_close(cams * maps[0, 0].numel(), expected)
    torch.testing.assert_close(scores, model.head.fc(maps.mean((2, 3)))[
        [0, 1], chosen])
    assert torch.equal(hires_cam(model, images)[1],
                       model.head.fc(maps.mean((2, 3))).argmax(1))


@pytest.mark.parametrize('build', [segmentor, detector])
@pytest.mark.parametrize('index', [0, -1])
def test_a_place_raises_the_score_by_its_value(build, index):
    """By finite differences: the map made larger at one place alone."""
    model, images = build().double(), torch.randn(1, 3, 48, 64).double()
    # Of a class whose map is not 0 everywhere, as random weights leave some.
    cams, (category, ), (score, ) = next(
        found for label in range(3 if build is detector else 5)
        if (found := hires_cam(model, images, [label], index))[0].any())
    step = 1e-6

    def change(place: int) -> float:
        """Of the score, by a step of the map there."""
        def grow(_, args, outs):
            outs = [out.clone() for out in outs]
            outs[index].flatten(2)[..., place] *= 1 + step
            return tuple(outs)

        handle = model.backbone.register_forward_hook(grow)
        with torch.no_grad():
            changed = class_scores(model, images)[0, category]
        handle.remove()
        return (changed - score).item() / step

    highest = cams.flatten().topk(3).indices.tolist()
    torch.testing.assert_close(
        cams.flatten()[highest], torch.tensor([change(i) for i in highest]).double(),
        rtol=1e-3, atol=1e-6)


def test_a_detectors_score_is_the_sum_over_its_anchors():
    model, images = detector(), torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        found = class_scores(model, images)
        outs = model(images, mode='tensor')[0]
    for image in range(2):
        for label in range(3):
            # Channels are anchor by anchor, each with its classes.
            expected = sum(x[image, label::3].sigmoid().sum() for x in outs)
            torch.testing.assert_close(found[image, label], expected)
    model.bbox_head.test_cfg.score_thr = least = .5
    with torch.no_grad():
        found = class_scores(model, images)[1, 2]
    kept = [y[y > least] for x in outs for y in [x[1, 2::3].sigmoid()]]
    assert 0 < sum(len(x) for x in kept) < sum(x[1, 2::3].numel() for x in outs)
    torch.testing.assert_close(found, torch.cat(kept).sum())


def test_softmax_scores_are_without_the_background():
    model = detector(loss_cls=dict(type='CrossEntropyLoss'))
    x = torch.randn(1, 2 * 4, 3, 5)
    scores = anchor_scores(x, model.bbox_head)
    assert scores.shape == (1, 30, 3)
    torch.testing.assert_close(scores[0, 1], x[0, 4:, 0, 0].softmax(0)[:3])


def test_what_is_not_there_is_named(tmp_path):
    model, images = classifier(tmp_path), torch.randn(1, 3, 48, 64)
    with pytest.raises(ValueError, match='index=1: expected that of a map'):
        hires_cam(model, images, index=1)
    with pytest.raises(ValueError, match=r'categories=\[10\]: .* below 10'):
        hires_cam(model, images, [10])
    with pytest.raises(ValueError, match=r'index=0: .* that the model reads, one of \[1\]'):
        hires_cam(classifier(tmp_path, out_indices=(0, 1)), images, index=0)
    del model.head
    with pytest.raises(ValueError, match='ImageClassifier: expected'):
        hires_cam(model, images)

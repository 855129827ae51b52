"""A trained model converted, fine-tuned and tested: tools/less_attention.py."""

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

from builders import digits_config, train
from mmlavit.analysis.conversion import (Conversion, convert_and_tune,
                                         with_less_attention)

VIT = dict(
    type='VisionTransformer', img_size=32, patch_size=8,
    arch=dict(embed_dims=32, num_layers=4, num_heads=2, feedforward_channels=32))


def vit_config(digits) -> Config:
    config = digits_config(
        digits, model__backbone=VIT, model__neck=None,
        train_cfg__max_epochs=1)
    loader = config.train_dataloader.copy()
    loader.sampler = dict(type='DefaultSampler', shuffle=False)
    evaluator = dict(type='Accuracy', topk=(1, ))
    config.update(
        model=dict(config.model, head=dict(
            type='VisionTransformerClsHead', num_classes=10, in_channels=32, topk=(1, ))),
        val_dataloader=loader, test_dataloader=loader, val_cfg=dict(), test_cfg=dict(),
        val_evaluator=evaluator, test_evaluator=evaluator)
    config.model.backbone.pop('pretrain_img_size', None)
    config.model.backbone.pop('out_indices', None)
    return config


def test_accuracy_before_and_after(digits, tmp_path):
    config = vit_config(digits)
    weights = train(config, tmp_path / 'train')
    how = Conversion(layers=[2, 3], num_layers=None, min_similarity=.8, mixing='full',
                     epochs=1, lr=1e-4, rounds=2, control=True)
    rows = convert_and_tune(config, str(tmp_path / 'train/epoch_1.pth'), tmp_path / 'la',
                            how)
    assert [row['model'] for row in rows] == [
        'trained', 'trained on, 1 epochs', 'converted', 'fine-tuned, 1 epochs']
    assert all(0 <= float(row['accuracy/top1']) <= 100 for row in rows)
    assert rows[0]['speed ratio'] == rows[1]['speed ratio'] == '1.00'
    assert float(rows[2]['backbone, ms']) > 0
    # What was written is the model that was measured, from the trained weights.
    converted = Config.fromfile(tmp_path / 'la/config.py')
    assert converted.custom_imports['imports'][-1].endswith('la_vit')
    model = MODELS.build(converted.model.backbone)
    model.load_state_dict({n[9:]: x for n, x in weights.items()
                           if n.startswith('backbone.')})
    q = weights['backbone.layers.3.attn.qkv.weight']
    assert torch.equal(model.layers[3].attn.qkv.v.weight, q[64:])
    assert torch.equal(model.layers[3].attn.qkv.psi.matrix(), torch.eye(16))
    tuned = torch.load(tmp_path / 'la/tuned/epoch_1.pth', weights_only=False)
    assert tuned['state_dict']['backbone.layers.3.attn.qkv.theta.weight'].abs().max() > 0


def test_backbones_that_cannot_be_converted_are_named(digits):
    config = digits_config(digits)
    with pytest.raises(ValueError, match="type='LaViT'.*a ViT or Swin of mmpretrain"):
        with_less_attention(config, [1], 'full')

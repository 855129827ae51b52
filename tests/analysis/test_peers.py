"""The models that LaViT is compared with."""
import pytest

from mmlavit.analysis.peers import backbone_config, build_backbone


def test_twins_have_vanilla_attention_alone():
    for arch in ('T', 'S', 'B'):
        model = build_backbone(f'LaViT-{arch}-twin')
        kinds = {type(block.attn).__name__ for stage in model.stages
                 for block in stage.blocks}
        assert kinds == {'VanillaAttention'}
        assert all(stage.downsample is None for stage in model.stages)


def test_unknown_models_are_named():
    for name in ('NoNet', 'mmdet.NoNet(depth=1)', 'two words'):
        with pytest.raises(ValueError, match='expected the path.*LaViT-S') as error:
            backbone_config(name)
        assert str(error.value).startswith(f'{name}: ')


def test_registered_classes_are_taken_with_their_arguments():
    model = build_backbone('mmdet.ResNet(depth=18, out_indices=(2, ))')
    assert model.depth == 18 and model.out_indices == (2, )
    assert type(build_backbone('mmpretrain.LeNet5')).__name__ == 'LeNet5'

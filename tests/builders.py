"""Small models and batches that several test modules use."""
import torch
from mmengine.structures import InstanceData, PixelData
from torch import nn

ARCH = dict(
    embed_dims=(8, 16, 24, 32),
    depths=(2, 2, 3, 2),
    num_heads=(1, 2, 3, 4),
    num_va_layers=(2, 1, 1, 0))


def randomise(model: nn.Module, std: float = 0.2) -> nn.Module:
    """Weights at which every path of the model matters."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=std)
    return model


def images(size: tuple) -> list:
    return [torch.randint(0, 255, (3, *size)).byte() for _ in range(2)]


def detection_batch(model: nn.Module, size: tuple = (96, 128)) -> dict:
    from mmdet.structures import DetDataSample
    samples = []
    for i in range(2):
        sample = DetDataSample(metainfo=dict(
            img_shape=size, ori_shape=size, pad_shape=size,
            scale_factor=(1, 1)))
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor([[8. + i, 8, 40, 44], [50, 20, 90, 90]]),
            labels=torch.tensor([i, 2]))
        samples.append(sample)
    return model.data_preprocessor(
        dict(inputs=images(size), data_samples=samples), training=True)


def segmentation_batch(model: nn.Module, size: tuple = (96, 128)) -> dict:
    from mmseg.structures import SegDataSample
    samples = []
    for _ in range(2):
        sample = SegDataSample(metainfo=dict(img_shape=size, ori_shape=size))
        mask = torch.randint(0, 150, (1, *size))
        mask[:, :8] = 255
        sample.gt_sem_seg = PixelData(data=mask)
        samples.append(sample)
    return model.data_preprocessor(
        dict(inputs=images(size), data_samples=samples), training=True)


def classification_batch(model: nn.Module, size: tuple = (64, 64)) -> dict:
    from mmpretrain.structures import DataSample
    samples = [DataSample().set_gt_label(i) for i in (3, 7)]
    return model.data_preprocessor(
        dict(inputs=images(size), data_samples=samples), training=True)


BATCHES = dict(
    mmdet=detection_batch,
    mmseg=segmentation_batch,
    mmpretrain=classification_batch)

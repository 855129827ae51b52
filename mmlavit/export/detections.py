"""A dense detector from images to boxes, decoding and NMS in the graph."""
from typing import List, Set, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

from .parts import Part


class Detections(Part):
    """RetinaNet and its like: one score per class and four deltas per anchor.

    The same steps and settings (``test_cfg``) as mmdetection's, with tensors of
    fixed length in place of lists: each image has ``max_per_img`` rows, best first,
    and those that are empty are 0 with label -1. The head's own anchors and
    box coder are used.

    Args:
        model (nn.Module): A single-stage detector.

    Raises:
        ValueError: If its head or its ``test_cfg`` is of another kind.
    """
    task = 'detection'
    inputs = ('images', 'shapes')
    outputs = ('dets', 'labels')

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head = model.bbox_head
        cfg = self.head.test_cfg
        # By name: mmdetection need not be there for the other parts.
        coder = type(getattr(self.head, 'bbox_coder', None)).__name__
        check(coder == 'DeltaXYWHBBoxCoder', 'bbox_head.bbox_coder', coder,
              'DeltaXYWHBBoxCoder')
        check(getattr(self.head, 'use_sigmoid_cls', False), 'bbox_head.loss_cls',
              getattr(self.head, 'loss_cls', None), 'one with use_sigmoid=True')
        for name in ('score_thr', 'nms', 'max_per_img'):
            check(name in cfg, f'test_cfg.{name}', None, "RetinaNet's settings")
        check(cfg.get('nms_pre', -1) > 0, 'test_cfg.nms_pre',
              cfg.get('nms_pre'), 'a number above 0, e.g. 1000')
        check(set(cfg.nms) <= {'type', 'iou_threshold'} and
              cfg.nms.get('type', 'nms') == 'nms', 'test_cfg.nms', cfg.nms,
              "dict(type='nms', iou_threshold=0.5)")
        levels = self.head.prior_generator.num_levels
        check(cfg.max_per_img <= cfg.nms_pre * levels, 'test_cfg.max_per_img',
              cfg.max_per_img, f'at most nms_pre * levels = {cfg.nms_pre * levels}')
        self.cfg = cfg

    def example(self, batch: int, height: int, width: int) -> Tuple[Tensor, ...]:
        images, = super().example(batch, height, width)
        shapes = torch.tensor(images.shape[2:]).expand(batch, 2)
        return images, shapes.float().contiguous()

    def numbers(self) -> Set[int]:
        return super().numbers() | {self.head.cls_out_channels}

    def forward(self, images: Tensor, shapes: Tensor) -> Tuple[Tensor, Tensor]:
        """Images and their sizes to boxes.

        Args:
            images (Tensor): (B, 3, H, W), padded at the bottom and right.
            shapes (Tensor): (B, 2), height and width in pixels of each without
                the padding, where boxes are clipped; of the images' type.

        Returns:
            tuple[Tensor, Tensor]: (B, max_per_img, 5), corners x1, y1, x2, y2 in
            pixels of ``images`` and the score; and the labels (B, max_per_img).
        """
        outs = self.model(images, mode='tensor')
        check(len(outs) == 2, 'bbox_head', type(self.head).__name__,
              'one whose outputs are class scores and box deltas')
        scores, labels, anchors, deltas = self.candidates(*outs)
        boxes = self.head.bbox_coder.decode(
            anchors.flatten(0, 1), deltas.flatten(0, 1)).unflatten(
                0, (images.shape[0], -1))
        if self.head.bbox_coder.clip_border:
            limits = shapes.flip(1).repeat(1, 2)[:, None]  # w, h, w, h
            boxes = torch.minimum(boxes.clamp(min=0), limits)
        if self.cfg.get('min_bbox_size', -1) >= 0:
            sides = boxes[..., 2:] - boxes[..., :2]
            large = (sides > self.cfg.min_bbox_size).all(-1)
            scores = torch.where(large, scores, 0)
        scores = self.suppress(boxes, scores, labels, shapes)
        scores, best = scores.topk(self.cfg.max_per_img)
        boxes = boxes.gather(1, best[..., None].expand(-1, -1, 4))
        found = scores > 0
        dets = torch.cat([boxes, scores[..., None]], -1)
        return (torch.where(found[..., None], dets, 0),
                torch.where(found, labels.gather(1, best), -1))

    def candidates(self, cls_scores: List[Tensor],
                   bbox_preds: List[Tensor]) -> Tuple[Tensor, ...]:
        """The best ``nms_pre`` of each level: what is not above the threshold is 0.

        Returns:
            tuple[Tensor]: Scores and labels (B, n), anchors and deltas (B, n, 4).
        """
        # Of grids with a row and a column more, for grids of one row would be a case of
        # their own to torch.export.
        levels = self.head.prior_generator.grid_priors(
            [(x.shape[2] + 1, x.shape[3] + 1) for x in cls_scores],
            dtype=cls_scores[0].dtype,
            device=cls_scores[0].device)
        found = []
        for cls_score, bbox_pred, anchors, per_cell in zip(
                cls_scores, bbox_preds, levels,
                self.head.prior_generator.num_base_priors):
            scores = cls_score.permute(0, 2, 3, 1).flatten(1).sigmoid()
            scores = torch.where(scores > self.cfg.score_thr, scores, 0)
            # Small maps have fewer: topk takes a fixed number.
            scores, best = F.pad(scores, (0, self.cfg.nms_pre)).topk(
                self.cfg.nms_pre)
            best = torch.where(scores > 0, best, 0)
            anchor = best // self.head.cls_out_channels
            row = anchor // (cls_score.shape[3] * per_cell)
            deltas = bbox_pred.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4))
            found.append((scores, best % self.head.cls_out_channels,
                          anchors[anchor + row * per_cell],
                          deltas.gather(1, anchor[..., None].expand(-1, -1, 4))))
        return tuple(torch.cat(x, 1) for x in zip(*found))

    def suppress(self, boxes: Tensor, scores: Tensor, labels: Tensor,
                 shapes: Tensor) -> Tensor:
        """Scores (B, n), 0 where a better box of the class and image covers it."""
        # One NMS for all: classes lie side by side, images below each other.
        step = torch.maximum(shapes.max(), boxes.max()) + 1
        image = torch.arange(boxes.shape[0], device=boxes.device)
        offset = torch.stack([
            labels.to(boxes.dtype),
            image.to(boxes.dtype)[:, None].expand(-1, boxes.shape[1])
        ], -1) * step
        boxes = (boxes + offset.repeat(1, 1, 2)).flatten(0, 1)
        # torch.export takes it for granted that NMS keeps two.
        far = boxes.new_tensor([[-9e5, -9e5, -8e5, -8e5], [-7e5, -7e5, -6e5, -6e5]])
        boxes, flat = torch.cat([boxes, far]), F.pad(scores.flatten(), (0, 2), value=1)
        given = flat.nonzero()[:, 0]
        kept = given[nms(boxes[given], flat[given], self.cfg.nms.iou_threshold)]
        flat = torch.zeros_like(flat).scatter(0, kept, flat[kept])
        return flat[:-2].view(scores.shape)


def check(ok: bool, name: str, value, expected: str) -> None:
    if not ok:
        raise ValueError(f'end-to-end export: {name}={value}: expected {expected}')

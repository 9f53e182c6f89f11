"""The mosaic: four pictures of a batch make a new one (Bochkovskiy et al. 2020, YOLOv4).

Shapes: B batch, H height, W width.
"""

import torch
from torch import Tensor

from lit_models.boxes import area, clip


def mosaic(
    images: Tensor,
    targets: list[dict],
    generator: torch.Generator | None = None,
    least_share: float = 0.2,
    least_side: float = 2.0,
) -> tuple[Tensor, list[dict]]:
    """Put four images of a batch (B, 3, H, W) together to each new one (Bochkovskiy et al. 2020).

    They meet in a point in the middle half of the new image of H x W. Each new image has a part of that image of the batch
    with its number, and of three others at random; which part of an image is seen is random, too. What lies beyond an
    image's own size is not looked at; a tile larger than its image has zeros beside it.

    Args:
        images: normalised, so that zeros are a mean colour.
        targets: `boxes`, `labels` and, where there are any, `difficult` and `masks` go with the images; `proposals` are
            left out.
        generator: of the random numbers; None: torch's.
        least_share: objects of which less is left are left out,
        least_side: and those that are narrower or lower, in pixels.

    Returns:
        A batch of the same shape, and its targets.
    """
    count, _, height, width = images.shape
    others = torch.randint(count, (count, 4), generator=generator)
    others[:, 0] = torch.arange(count)
    order = torch.rand(count, 4, generator=generator).argsort(dim=1)  # in any of the four places
    others = others.gather(1, order).tolist()
    middles = (0.25 + 0.5 * torch.rand(count, 2, generator=generator)).tolist()
    shifts = torch.rand(count, 4, 2, generator=generator).tolist()

    made, made_targets = torch.zeros_like(images), []
    for i in range(count):
        y, x = round(middles[i][0] * height), round(middles[i][1] * width)
        tiles = ((0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height))
        parts = []
        for (x1, y1, x2, y2), k, (right, down) in zip(tiles, others[i], shifts[i], strict=True):
            target = targets[k]
            h, w = target["size"]
            left, top = (
                x1 + round(right * (x2 - x1 - w)),
                y1 + round(down * (y2 - y1 - h)),
            )  # where its corner comes to lie
            x1, y1, x2, y2 = max(x1, left), max(y1, top), min(x2, left + w), min(y2, top + h)
            here, there = (slice(y1, y2), slice(x1, x2)), (slice(y1 - top, y2 - top), slice(x1 - left, x2 - left))
            made[i][:, *here] = images[k][:, *there]

            whole = target["boxes"] + target["boxes"].new_tensor([left, top, left, top])
            corner = whole.new_tensor([x1, y1, x1, y1])
            boxes = clip(whole - corner, (y2 - y1, x2 - x1)) + corner
            kept = (area(boxes) >= least_share * area(whole)) & ((boxes[:, 2:] - boxes[:, :2]) >= least_side).all(dim=1)
            part = {"boxes": boxes[kept], "labels": target["labels"][kept]}
            if "difficult" in target:
                part["difficult"] = target["difficult"][kept]
            if "masks" in target:
                part["masks"] = target["masks"].new_zeros(int(kept.sum()), height, width)
                part["masks"][:, *here] = target["masks"][kept][:, *there]
            parts.append(part)
        target = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        made_targets.append(target | {"size": (height, width)})
    return made, made_targets

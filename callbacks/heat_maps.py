"""Where in a picture a convolutional network looked: Grad-CAM (Selvaraju et al. 2017)."""

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from callbacks.pictures import ClassificationPictures, name_picture, new_figure, pixels


class HeatMapPictures(ClassificationPictures):
    """`heat_maps.png` beside the pictures of every classifier: a few test pictures, wrong ones first, and their heat maps."""

    count = 8

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        super().on_test_end(trainer, pl_module)
        shown = self.some(self.count, wrong=self.count // 2)
        images = torch.stack([image for image, _, _ in shown]).to(pl_module.device, pl_module.dtype)  # (N, C, H, W)
        classes = self.names(trainer, pl_module)
        maps = grad_cam(pl_module, images)
        if maps is None:
            return
        figure = new_figure(1.75 * len(shown), 4.0)
        figure.suptitle(
            "what spoke for the predicted class (Grad-CAM): red most; below, the pictures alone", fontsize=11
        )
        grid = figure.subplots(2, len(shown), squeeze=False)
        for (above, below), heat, (image, predicted, label) in zip(grid.T, maps, shown, strict=True):
            for axis in (above, below):
                axis.imshow(pixels(image), cmap="gray")
                axis.axis("off")
            above.imshow(heat.numpy(), cmap="jet", alpha=0.45, vmin=0, vmax=1)
            name_picture(above, classes, predicted, label)
        self.run.save_picture("heat_maps", figure)


def grad_cam(model: LightningModule, images: Tensor) -> Tensor | None:
    """Return how much each pixel spoke for the predicted class. (Of a vision transformer the only maps are its patches'.)

    The last maps of the network, each weighted by the mean of the class score's gradient over it; what is positive of
    their sum, scaled to the picture's size.

    Args:
        model: from images to logits.
        images: (N, C, H, W).

    Returns:
        (N, H, W) from 0 to 1, on the CPU; None for a network without maps of more than a pixel.
    """
    maps: list[Tensor] = []

    def keep(module, inputs, output) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] * output.shape[3] > 1:
            maps[:] = [output]

    hooks = [module.register_forward_hook(keep) for module in model.modules() if module is not model]
    try:
        # Lightning tests in inference mode, whose tensors know no gradients
        with torch.inference_mode(False), torch.enable_grad():
            logits = model.forward(images.clone().requires_grad_())  # compiled, its maps would be no part of the graph
            if not maps:
                return None
            (gradient,) = torch.autograd.grad(logits.max(dim=1).values.sum(), maps[0])  # (N, D, h, w)
    finally:
        for hook in hooks:
            hook.remove()
    weights = gradient.mean(dim=(2, 3), keepdim=True)  # (N, D, 1, 1)
    heat = (weights * maps[0]).sum(dim=1, keepdim=True).relu().detach().float()  # (N, 1, h, w)
    heat = F.interpolate(heat, images.shape[2:], mode="bilinear")[:, 0]  # (N, H, W)
    return (heat / heat.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)).cpu()

"""Random views of a whole batch of images, each image with its own crop, flip, blur and colors, on any device.

Owns the geometry and colors of views. Knows nothing of where images come from or what views are for.

Crop, flip, resizing and blur are linear along rows and along columns, so each is a matrix for every image, and a view
is two batched matrix products. Brightness, contrast, saturation, hue and gray are a matrix of the channels.
"""

import math
from typing import NamedTuple

import torch

__all__ = ['View', 'blurring', 'coloring', 'make_view', 'random_boxes', 'resized_crops', 'resizing']

LUMA = (0.299, 0.587, 0.114)
TO_YIQ = torch.tensor([LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])


class View(NamedTuple):
    """How one view of each image is drawn."""

    size: int  # of its side, in pixels
    scale: tuple[float, float]  # share of the image's area
    jitter: float = 0.4  # of brightness and contrast, half of it for saturation, a quarter for hue; 4 in 5 images
    gray: float = 0.2  # share of images without color
    blur: float = 0.0  # share of images that are blurred
    solarize: float = 0.0


def make_view(
    images: torch.Tensor,
    view: View,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Normalized views (B, C, size, size), float32, of uint8 images (B, C, H, W), drawn from torch's CPU generator.

    The matrix products are in ``dtype``: bfloat16 has the eight bits that the images have.
    """
    b, c, h, w = images.shape
    boxes, flipped = random_boxes(b, h, w, view.scale), torch.rand(b) < 0.5
    sigma = torch.empty(b).uniform_(0.1, view.size / 56) * (torch.rand(b) < view.blur)
    mix, contrast = coloring(b, c, view.jitter, view.gray)
    solarized = (torch.rand(b) < view.solarize).to(images.device)
    rows, columns = resizing(boxes[:, 0], boxes[:, 2], h, view.size), resizing(boxes[:, 1], boxes[:, 3], w, view.size)
    columns = torch.where(flipped[:, None, None], columns.flip(1), columns)
    if view.blur:
        kernels = blurring(sigma, view.size)
        rows, columns = kernels @ rows, kernels @ columns
    x = resized_crops(images, rows, columns / 255, dtype).flatten(2)  # B, C, S*S, from 0 to 1
    mix, contrast = mix.to(x.device), contrast.to(x.device)
    shift, scale = (torch.tensor(v, device=x.device).view(-1, 1) for v in (mean, std))
    middle = luma(x.mean(dim=2, keepdim=True))  # B, 1, 1
    x = torch.baddbmm((mix.sum(dim=2, keepdim=True) * middle * (1 - contrast)), mix * contrast, x).clamp_(0, 1)
    if view.solarize:
        x = torch.where(solarized[:, None, None] & (x >= 0.5), 1 - x, x)
    return x.sub_(shift).div_(scale).view(b, c, view.size, view.size)


def random_boxes(count: int, height: int, width: int, scale: tuple[float, float], tries: int = 10) -> torch.Tensor:
    """(count, 4) top, left, height, width in pixels, distributed as those of torchvision's RandomResizedCrop."""
    area = height * width * torch.empty(count, tries).uniform_(*scale)
    ratio = torch.empty(count, tries).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w <= width) & (h <= height) & (w > 0) & (h > 0)
    first = fits.int().argmax(dim=1, keepdim=True)  # of several maxima the first
    w, h = (x.gather(1, first)[:, 0] for x in (w, h))
    side = float(min(height, width))
    w, h = torch.where(fits.any(dim=1), w, side), torch.where(fits.any(dim=1), h, side)
    top, left = (torch.rand(count) * (height - h + 1)).floor(), (torch.rand(count) * (width - w + 1)).floor()
    return torch.stack([top, left, h, w], dim=1)


def resizing(start: torch.Tensor, length: torch.Tensor, pixels: int, size: int) -> torch.Tensor:
    """(B, size, pixels): from ``pixels`` to the ``size`` of the crop, bilinear with antialiasing as Pillow's."""
    scale = (length / size)[:, None, None]
    center = (torch.arange(size) + 0.5)[:, None] * scale  # in the crop
    position = torch.arange(pixels) - start[:, None, None]
    weights = (1 - ((position + 0.5 - center) / scale.clamp(min=1)).abs()).clamp(min=0)
    weights = weights * ((position >= 0) & (position < length[:, None, None]))
    return weights / weights.sum(dim=2, keepdim=True)


def blurring(sigma: torch.Tensor, size: int) -> torch.Tensor:
    """(B, size, size): a Gaussian of ``sigma`` pixels along a side; the identity where that is 0."""
    distance = torch.arange(size)[:, None] - torch.arange(size)
    weights = (-0.5 * (distance / sigma.clamp(min=1e-3)[:, None, None]).square()).exp()
    return weights / weights.sum(dim=2, keepdim=True)


def resized_crops(
    images: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """(B, C, S, S), float32, of images (B, C, H, W)."""
    rows, columns = rows.to(images.device, dtype), columns.to(images.device, dtype)
    b, c, h, w = images.shape
    x = images.transpose(1, 2).to(dtype).reshape(b, h, c * w)
    x = torch.bmm(rows, x).view(b, -1, w)  # B, S*C, W
    return torch.bmm(x, columns.mT).view(b, rows.shape[1], c, -1).transpose(1, 2).float().contiguous()


def coloring(count: int, channels: int, jitter: float, gray: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, C, C) brightness, saturation, hue and gray, and (B, 1, 1) contrast, to the mean of the image's luma."""
    on = (torch.rand(count) < 0.8).float() * jitter

    def around_one(strength: float) -> torch.Tensor:
        return (1 + strength * on * torch.empty(count).uniform_(-1, 1))[:, None, None]

    brightness, contrast, saturation = around_one(1), around_one(1), around_one(0.5)
    angle = 2 * math.pi * 0.25 * on * torch.empty(count).uniform_(-1, 1)
    saturation = saturation * (torch.rand(count) >= gray)[:, None, None]
    if channels != 3:
        return brightness * torch.eye(channels), contrast
    turn = torch.zeros(count, 3, 3)  # of the two axes of color
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = angle.cos()
    turn[:, 1, 2], turn[:, 2, 1] = -angle.sin(), angle.sin()
    hue = torch.linalg.inv(TO_YIQ) @ turn @ TO_YIQ
    blend = saturation * torch.eye(3) + (1 - saturation) * torch.tensor(LUMA)
    return brightness * (hue @ blend), contrast


def luma(x: torch.Tensor) -> torch.Tensor:
    """(B, 1, N) of (B, C, N)."""
    if x.shape[1] != 3:
        return x.mean(dim=1, keepdim=True)
    return (torch.tensor(LUMA, device=x.device) @ x)[:, None]

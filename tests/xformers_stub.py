"""The part of xformers.ops that DINOv2 needs for its ViTs, on torch alone; importing puts it in xformers' place."""

import sys
from types import ModuleType

import torch
import torch.nn.functional as F


class BlockDiagonalMask:
    """Which tokens of a long row belong to one sequence."""

    def __init__(self, lengths, batch_sizes=None):
        self.lengths, self._batch_sizes = lengths, batch_sizes

    @classmethod
    def from_seqlens(cls, lengths):
        return cls(lengths)

    @classmethod
    def from_tensor_list(cls, tensors):
        lengths = [t.shape[1] for t in tensors for _ in range(len(t))]
        return cls(lengths, [len(t) for t in tensors]), torch.cat([t.flatten(0, 1) for t in tensors])[None]

    def split(self, x):  # 1, tokens of all sequences, ... -> a tensor of sequences of each length
        ends = torch.tensor(self._batch_sizes).cumsum(0).tolist()
        groups = [self.lengths[end - n : end] for end, n in zip(ends, self._batch_sizes)]
        parts = x[0].split([sum(group) for group in groups])
        return [part.unflatten(0, (len(group), group[0])) for part, group in zip(parts, groups)]


def memory_efficient_attention(q, k, v, attn_bias=None):  # B, L, num_heads, head_dim
    parts = zip(*([t] if attn_bias is None else attn_bias.split(t) for t in (q, k, v)))
    out = (F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in part)).transpose(1, 2) for part in parts)
    return torch.cat([t.flatten(0, 1) for t in out]).view(q.shape)


def index_select_cat(tensors, indices):
    return torch.cat([t[i].flatten() for t, i in zip(tensors, indices)])


def scaled_index_add(x, index, source, scaling, alpha):
    return torch.index_add(x, 0, index, source * scaling, alpha=alpha)


ops = ModuleType('xformers.ops')
ops.fmha = ModuleType('xformers.ops.fmha')
ops.fmha.BlockDiagonalMask = BlockDiagonalMask
ops.memory_efficient_attention, ops.unbind = memory_efficient_attention, torch.unbind
ops.index_select_cat, ops.scaled_index_add = index_select_cat, scaled_index_add
sys.modules['xformers'] = package = ModuleType('xformers')
sys.modules['xformers.ops'] = package.ops = ops

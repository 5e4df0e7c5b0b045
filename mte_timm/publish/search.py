"""The networks in a training checkpoint, and which of them is the one to publish.

Owns keys, prefixes and wrappers. Knows nothing of what the tensors mean.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Optional

import torch
from torch import nn

from .loading import CheckpointError

__all__ = ['Place', 'find_network', 'state_dicts', 'summary', 'unwrapped_name']

# modules that hold another one: torch.compile, DeepSpeed and Lightning, FSDP, activation checkpointing
WRAPPERS = {'_orig_mod', '_forward_module', '_fsdp_wrapped_module', '_checkpoint_wrapped_module'}
# words in keys and prefixes: DINO and iBOT publish the teacher and timm the EMA, MoCo and BYOL the online network
PUBLISHED = {'teacher', 'ema', 'average', 'averaged', 'swa'}
STUDENTS, COPIES = {'student', 'current'}, {'momentum', 'target', 'key', 'k'}
# an optimizer's state may be kept under its parameters' names
OPTIMIZERS = re.compile(r'(?i)optim|^opt$|^exp_avg|momentum_buffer')
LORA = re.compile(r'\.lora_|\.base_layer\.(weight|bias)$')  # peft's
Tensors = dict[str, torch.Tensor]


class Place(NamedTuple):
    """A state dict in a checkpoint, and the prefix under which a network stands in it."""

    source: str  # key, with dots where it is nested; '' for the file itself
    prefix: str
    matches: int  # of the wanted tensors

    def __str__(self) -> str:
        return ': '.join(filter(None, (self.source, self.prefix))) or 'the top of the file'

    @property
    def key(self) -> str:
        """The key= that chooses it."""
        return '.'.join(filter(None, (self.source, self.prefix.rstrip('.')))) or 'the top'

    @property
    def rank(self) -> int:
        """Of several networks, the one with the highest rank is the one to publish."""
        words = set(re.split(r'[\W_]+', f'{self.source} {self.prefix}'.lower()))
        if words & PUBLISHED:
            return 3
        return 0 if words & COPIES else 1 if words & STUDENTS else 2


def unwrapped_name(name: str) -> str:
    """A parameter's name without the wrappers that it passes through, and without DDP's ``module`` before it."""
    parts = [part for part in name.split('.') if part not in WRAPPERS]
    while parts[:1] == ['module']:
        del parts[0]
    return '.'.join(parts)


def state_dicts(checkpoint: Mapping[str, Any]) -> dict[str, Tensors]:
    """All state dicts in a checkpoint by dotted key, parameter names without wrappers.

    Raises:
        CheckpointError: there are none, or unmerged LoRA adapters.
    """
    found = dict(_walk(checkpoint, '', ()))
    if not found:
        raise CheckpointError(f'holds no tensors; its keys are {summary(k for k in checkpoint if isinstance(k, str))}')
    if lora := next((k for t in found.values() for k in t if LORA.search(k)), None):
        raise CheckpointError(
            f'holds LoRA adapters beside the weights that they change ({lora}): merge them first, with peft '
            'model = model.merge_and_unload(), and save that state_dict()'
        )
    return found


def _walk(entry: Any, source: str, above: tuple[int, ...]) -> Iterator[tuple[str, Tensors]]:
    if isinstance(entry, nn.Module):  # a whole pickled model, which the caller trusts
        entry = entry.state_dict()
    if not isinstance(entry, Mapping) or id(entry) in above:  # pickles may hold themselves
        return
    own = [(k, v.detach()) for k, v in entry.items() if isinstance(k, str) and isinstance(v, torch.Tensor)]
    tensors = {unwrapped_name(k): v for k, v in own}
    if len(tensors) < len(own):
        twice = next(k for k, v in own if tensors[unwrapped_name(k)] is not v)
        raise CheckpointError(
            f'holds two networks that differ in a wrapper alone ({twice}, {unwrapped_name(twice)}); save one of them'
        )
    if tensors:
        yield source, tensors
    for key, value in entry.items():
        if isinstance(key, str) and not OPTIMIZERS.search(key):
            yield from _walk(value, f'{source}.{key}' if source else key, (*above, id(entry)))


def find_network(
    found: Mapping[str, Tensors], num_wanted: int, count: Callable[[Tensors], int], key: Optional[str], model: str
) -> Place:
    """The network to publish: the one of which ``count`` finds most of the wanted tensors, or that ``key`` chooses.

    Raises:
        CheckpointError: there is none, or the choice is not clear.
    """
    within = _chosen(found, key)
    places = []
    for source, beginning in within.items():
        tensors = found[source]
        # a name may begin at 0 and behind each dot
        begun = Counter(k[: m.end()] for k in tensors if k.startswith(beginning) for m in re.finditer(r'^|\.', k))
        for prefix, size in begun.items():
            if size >= 0.1 * num_wanted:
                own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                places.append(Place(source, prefix, count(own)))
    most = max((p.matches for p in places), default=0)
    if most < num_wanted // 2:
        held = _keys({source: found[source] for source in within})
        raise CheckpointError(
            f'has only {most} of the {num_wanted} tensors of {model}. Is it another architecture? It holds {held}'
        )
    whole = [p for p in places if p.matches > 0.9 * most]
    highest = max(p.rank for p in whole)
    if partial := [p for p in places if p.matches > 0.5 * most and p.rank > highest]:
        raise CheckpointError(
            f'{partial[0]}, which is the network to publish, has only {partial[0].matches} of the {num_wanted} '
            f'tensors of {model}; to take {whole[0]} instead, name it with key='
        )
    best = [p for p in whole if p.rank == highest]
    # a conversion may strip a prefix itself: the longest one is where the network stands
    best = [p for p in best if not any(q.source == p.source and q.prefix.startswith(p.prefix) and q != p for q in best)]
    if len(best) > 1:
        raise CheckpointError(f'holds several such networks; choose one with key=: {", ".join(p.key for p in best)}')
    return best[0]


def _chosen(found: Mapping[str, Tensors], key: Optional[str]) -> dict[str, str]:
    """The state dicts that ``key`` chooses, each with the beginning of the names that it asks for."""
    if key is None:
        return dict.fromkeys(found, '')
    if chosen := {source: '' for source in found if f'{source}.'.startswith(f'{key}.')}:
        return chosen
    beginnings = {source: unwrapped_name(key.removeprefix(f'{source}.')) for source in found}
    for end in ('.', ''):  # 'model' is not the beginning of model_ema where there is a model
        if chosen := {s: b + end for s, b in beginnings.items() if any(name.startswith(b + end) for name in found[s])}:
            return chosen
    raise CheckpointError(f'has no key {key!r} and no parameters that begin with it; it has {_keys(found)}')


def _keys(found: Mapping[str, Tensors]) -> str:
    """What could be given as key=."""
    keys = {f'{source}.{name.split(".")[0]}'.removeprefix('.') for source, names in found.items() for name in names}
    return ', '.join(sorted(keys)[:12]) + ', ...' * (len(keys) > 12)


def summary(names: Any) -> str:
    """Names by their first part with counts: 'head (12), predictor (8)'."""
    counts = Counter(n if ' ' in n else n.split('.')[0] for n in names)
    shown = [n if c == 1 else f'{n} ({c})' for n, c in list(counts.items())[:12]]
    return ', '.join(shown) + (', ...' if len(counts) > 12 else '') or 'nothing'

# SPDX-License-Identifier: Apache-2.0
"""The adapters of a pipeline's U-Net: several at once, each with a name and a strength."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import jax
from flax import nnx
from jax.sharding import Mesh

from k3jax.checkpoints.lora_files import Lora, load_lora, warn_of_another_base
from k3jax.model.adapters import (
    Weights,
    apply,
    check_fits,
    combine,
    lora_shardings,
    update_factor,
)
from k3jax.sharding import place


DEFAULT_NAME = "default"
"""Of an adapter that is loaded without a name."""


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter on the devices.

    Attributes:
        lora: the file, with weights on the host.
        weights: the same on the mesh.
        scale: strength; 1 as it was trained, 0 switches it off.
    """

    lora: Lora
    weights: Weights
    scale: float

    @property
    def factor(self) -> float:
        return update_factor(self.lora.config, self.scale)


@dataclass(frozen=True)
class Adapters:
    """A U-Net and its adapters. Methods return a new object; the base U-Net is never changed.

    Attributes:
        base: the U-Net without adapters.
        loaded: the adapters by name.
    """

    base: nnx.Module
    loaded: Mapping[str, LoadedAdapter]

    def unet(self) -> nnx.Module:
        """The U-Net with all adapters; the same program for other strengths."""
        if not self.loaded:
            return self.base
        adapters = self.loaded.values()
        weights = combine([(adapter.weights, adapter.factor) for adapter in adapters])
        return apply(self.base, weights)

    def load(
        self, path: str, scale: float, name: str | None, mesh: Mesh, fingerprint: str | None
    ) -> "Adapters":
        """With the adapter of a folder, instead of one of the same name.

        Raises:
            ValueError: not an adapter, damaged, of another architecture, or an invalid scale.
        """
        lora = load_lora(path)
        update_factor(lora.config, scale)
        check_fits(lora.weights, self.base, lora.config, where=f"The LoRA {lora.path}")
        warn_of_another_base(lora, fingerprint)
        shardings = lora_shardings(self.base, lora.weights, mesh)
        adapter = LoadedAdapter(lora, jax.tree.map(place, lora.weights, shardings), scale)
        return replace(self, loaded={**self.loaded, name or DEFAULT_NAME: adapter})

    def with_scales(self, scales: Mapping[str, float]) -> "Adapters":
        """With these strengths, and 0 for the adapters that are not named."""
        for name in scales:
            self._check_name(name)
        loaded = {
            name: replace(adapter, scale=scales.get(name, 0.0))
            for name, adapter in self.loaded.items()
        }
        for adapter in loaded.values():
            update_factor(adapter.lora.config, adapter.scale)
        return replace(self, loaded=loaded)

    def without(self, name: str | None) -> "Adapters":
        """Without one adapter; None: without any."""
        if name is None:
            return replace(self, loaded={})
        self._check_name(name)
        return replace(self, loaded={k: v for k, v in self.loaded.items() if k != name})

    def _check_name(self, name: str) -> None:
        if name not in self.loaded:
            names = ", ".join(self.loaded) or "none"
            raise ValueError(f"no adapter is called {name!r}; loaded are: {names}.")


class AdaptedUNet:
    """The methods of a pipeline that add adapters to its `unet` and remove them."""

    unet: nnx.Module
    mesh: Mesh
    fingerprint: str | None
    _adapters: Adapters | None = None

    def load_lora(self, path: str, scale: float = 1.0, name: str | None = None) -> Lora:
        """Adds a LoRA to the U-Net, instead of the one of the same name (or without a name).

        LoRAs with different names are active together. The base's weights stay as they are.

        Args:
            path: the LoRA's folder.
            scale: strength; 1 as it was trained, 0 as without it. Another one compiles nothing.
            name: for `set_adapters` and `unload_lora`; "default" by default.

        Returns:
            What was read.

        Raises:
            ValueError: not a LoRA, damaged, or of another architecture.
        """
        adapters = self._adapters or Adapters(self.unet, {})
        adapters = adapters.load(path, scale, name, self.mesh, self.fingerprint)
        self._use(adapters)
        return adapters.loaded[name or DEFAULT_NAME].lora

    def set_adapters(
        self, names: str | Sequence[str], weights: float | Sequence[float] | None = None
    ) -> None:
        """Sets the strengths of loaded LoRAs (as in diffusers); compiles nothing.

        Args:
            names: the LoRAs to use; the others get strength 0 and stay loaded.
            weights: strength of all or of each of them; 1 by default.

        Raises:
            ValueError: a name that is not loaded, or a weight that is no finite number.
        """
        self._use(
            (self._adapters or Adapters(self.unet, {})).with_scales(scales_of(names, weights))
        )

    def unload_lora(self, name: str | None = None) -> None:
        """Removes a LoRA; without a name all of them."""
        if self._adapters is not None:
            self._use(self._adapters.without(name))

    def _use(self, adapters: Adapters) -> None:
        self.unet = adapters.unet()
        self._adapters = adapters if adapters.loaded else None


def scales_of(
    names: str | Sequence[str], weights: float | Sequence[float] | None
) -> dict[str, float]:
    """Name -> strength from one or several of each; 1 where no weight is given.

    Raises:
        ValueError: not as many weights as names.
    """
    names = [names] if isinstance(names, str) else list(names)
    if weights is None:
        weights = 1.0
    weights = list(weights) if isinstance(weights, Sequence) else [weights] * len(names)
    if len(weights) != len(names):
        raise ValueError(f"there are {len(names)} names of adapters, but {len(weights)} weights.")
    return dict(zip(names, weights, strict=True))

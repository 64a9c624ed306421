"""The `adapter:` section: which small set of weights is trained beside the base model's. Chosen by `type`."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from luthier.config.section import Conflict, Float, Int, Section, key

Targets = str | tuple[str, ...] | None
Start = Literal[
    "default", "gaussian", "orthogonal", "olora", "pissa", "mica", "eva", "corda", "lora_ga", "loftq"
]  # fmt: skip
Niter = Annotated[str, Field(pattern=r"^pissa_niter_\d{1,3}$", examples=["pissa_niter_16"])]
TAKEN_OUT = ("pissa", "olora", "corda", "lora_ga")  # starts that PEFT takes out of the base
FROM_ROWS = ("eva", "corda", "lora_ga")  # starts that look at training rows
DETAILS = tuple(f"{name}_config" for name in FROM_ROWS)


class Postprocessor(Section):
    """What happens to the adapter after training."""

    merge_adapter_into_base_model: bool = key(False, "Save merged weights beside the adapter after training.")
    progressbar: bool = key(False, "Ludwig's switch for a bar while merging; Luthier always shows progress.")


class Eva(Section):
    """How `init_lora_weights: eva` chooses directions and ranks, in PEFT's names."""

    rho: Float = key(2.0, "A layer may get up to rho r ranks, taken from others; 1: every layer keeps r.", ge=1)
    tau: Float = key(0.99, "Cosine between the directions of two passes from which on they count as found.", ge=0, le=1)
    use_label_mask: bool = key(True, "Look at trained tokens alone, not at prompts.")
    whiten: bool = key(False, "Divide directions by the root of their singular values.")
    adjust_scaling_factors: bool = key(True, "Keep the scale of the update where a layer's rank changes.")


class Corda(Section):
    """What `init_lora_weights: corda` trains, in PEFT's names."""

    corda_method: Literal["ipm", "kpm"] = key(
        "ipm", "Train what the rows use most (ipm), or keep that and train what they use least (kpm)."
    )


class LoraGa(Section):
    """How `init_lora_weights: lora_ga` makes factors of a gradient, in PEFT's names."""

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = key(
        "ArB2r", "Which of the gradient's 2 r first directions A and B get."
    )
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = key("stable", "How large the factors are.")
    stable_gamma: Int = key(16, "Gamma of scale: stable.", ge=1)


class BaseAdapter(Section):
    """What all adapters share."""

    pretrained_adapter_weights: str | None = key(None, "Folder of an adapter or of a run, or hub id, to go on from.")
    postprocessor: Postprocessor = key(Postprocessor, "What happens to the adapter after training.")
    target_modules: Targets = key(
        None,
        "Layers that get the adapter: names, or one regular expression; empty: what suits the type.",
    )
    modules_to_save: tuple[str, ...] | None = key(None, "Further layers trained whole and saved with the adapter.")


class Lora(BaseAdapter):
    """Low-rank updates beside linear layers."""

    type: Literal["lora"] = key("lora", "The kind of adapter.")
    target_modules: Targets = key(
        None,
        "Layers that get the adapter: names, or one regular expression; empty: every linear layer but the head.",
        ludwig=r".*\.(q_proj|v_proj|query_key_value|c_attn|qkv_proj|Wqkv)",
        why="all linear layers learn as much as full fine-tuning at small data sizes",
        source="Schulman et al. 2025, LoRA Without Regret; Dettmers et al. 2023, QLoRA, arXiv 2305.14314",
    )
    r: Int = key(
        16,
        "Rank of the update.",
        ludwig=8,
        why="enough for small data on all linear layers",
        source="Unsloth's guide to LoRA's hyperparameters: 16 or 32; Dettmers et al. 2023, QLoRA, arXiv 2305.14314: "
        "ranks from 8 to 256 on all layers end alike",
        ge=1,
        le=4096,
    )
    alpha: Int | None = key(
        None,
        "Scale of the update is alpha / r; empty: 2 r.",
        source="Biderman et al. 2024, LoRA Learns Less and Forgets Less, arXiv 2405.09673",
        ge=1,
    )
    dropout: Float = key(
        0.0,
        "Dropout before the update.",
        ludwig=0.05,
        why="does not regularise short runs, and costs time",
        source="Huang and Balestriero 2024, ALLoRA, arXiv 2410.09692; Unsloth's guide to LoRA's hyperparameters",
        ge=0,
        lt=1,
    )
    bias_type: Literal["none", "all", "lora_only"] = key("none", "Which bias terms are trained too.")
    use_dora: bool = key(False, "Learn direction and magnitude apart (DoRA).")
    use_rslora: bool = key(False, "Scale by alpha / sqrt(r) (rsLoRA).")
    init_lora_weights: Start | Niter = key(
        "default",
        "How the two factors start: drawn (default, gaussian, orthogonal); from the base's weights (pissa, the same by "
        "N rounds of a faster search, olora, and mica, which trains A alone); from rows (eva: inputs of the layers, "
        "corda: these and the weights, lora_ga: a gradient); from what `quantization` loses (loftq).",
    )
    init_rows: Int = key(128, "Training rows that eva, corda and lora_ga look at: the first of the run's order.", ge=1)
    eva_config: Eva | None = key(None, "Details of eva; empty: the defaults.")
    corda_config: Corda | None = key(None, "Details of corda; empty: the defaults.")
    lora_ga_config: LoraGa | None = key(None, "Details of lora_ga; empty: the defaults.")
    loraplus_lr_ratio: Float | None = key(None, "Learning rate of B over that of A (LoRA+).", gt=0)
    rank_pattern: dict[str, Int] | None = key(None, "Rank of layers whose name matches, instead of r.")
    alpha_pattern: dict[str, Int] | None = key(None, "Alpha of layers whose name matches, instead of alpha.")
    exclude_modules: Targets = key(None, "Layers that do not get the adapter.")
    layers_to_transform: tuple[Int, ...] | None = key(None, "Numbers of the decoder layers that get it; empty: all.")

    @model_validator(mode="before")
    @classmethod
    def _given(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        data = {name: value for name, value in data.items() if name not in DETAILS or value != {}}
        if data.get("init_lora_weights") is True:  # PEFT's word for it
            data["init_lora_weights"] = "default"
        if data.get("alpha") is None:
            rank = data.get("r", cls.model_fields["r"].default)
            if isinstance(rank, (int, str)) and not isinstance(rank, bool) and str(rank).isdigit():
                return {**data, "alpha": 2 * int(rank)}
        return data

    @model_validator(mode="after")
    def _starts(self) -> Lora:
        for name in DETAILS:
            if getattr(self, name) is not None and self.init_lora_weights != name.removesuffix("_config"):
                raise Conflict(
                    f"{name} has no effect beside init_lora_weights: {self.init_lora_weights}",
                    received=f"{name}, init_lora_weights: {self.init_lora_weights}",
                    allowed=f"{name} with init_lora_weights: {name.removesuffix('_config')}",
                    fix=f"leave {name} out, or set init_lora_weights: {name.removesuffix('_config')}",
                )
        if self.init_lora_weights == "loftq" and self.use_dora:
            raise Conflict(
                "init_lora_weights: loftq does not go with use_dora: its norms are those of other weights",
                received="init_lora_weights: loftq, use_dora: true",
                allowed="one of the two",
                fix="leave use_dora out, or use another init_lora_weights",
            )
        return self

    @property
    def takes_out(self) -> bool:
        """Whether its start is defined by taking factors out of the base: of twice the rank, half is frozen."""
        return self.init_lora_weights.partition("_niter_")[0] in TAKEN_OUT and not self.pretrained_adapter_weights

    @property
    def looks_at_rows(self) -> bool:
        """Whether its start needs training rows."""
        return self.init_lora_weights in FROM_ROWS and self.pretrained_adapter_weights is None


class AdaLora(Lora):
    """LoRA whose ranks are moved to where they help."""

    type: Literal["adalora"] = key("adalora", "The kind of adapter.")  # type: ignore[assignment]
    target_r: Int = key(8, "Average rank at the end.", ge=1)
    init_r: Int = key(12, "Rank at the start.", ge=1)
    tinit: Int = key(0, "Steps before ranks begin to shrink.", ge=0)
    tfinal: Int = key(0, "Steps at the end with fixed ranks.", ge=0)
    delta_t: Int = key(1, "Steps between two allocations.", ge=1)
    beta1: Float = key(0.85, "Smoothing of the sensitivity.", gt=0, lt=1)
    beta2: Float = key(0.85, "Smoothing of the uncertainty.", gt=0, lt=1)
    orth_reg_weight: Float = key(0.5, "Weight of the orthogonality penalty.", ge=0)
    total_step: Int | None = key(None, "All training steps; empty: counted.", ge=1)

    @model_validator(mode="after")
    def _shrinks(self) -> AdaLora:
        if self.init_lora_weights != "default":
            raise Conflict(
                "adalora has a start of its own",
                received=f"init_lora_weights: {self.init_lora_weights}",
                allowed="default",
                fix="leave init_lora_weights out",
            )
        if self.target_r >= self.init_r:
            raise Conflict(
                "target_r is not below init_r: there would be no rank to take away",
                received=f"target_r: {self.target_r}, init_r: {self.init_r}",
                allowed=f"a target_r below {self.init_r}",
                fix="lower target_r, or raise init_r",
            )
        return self


class Ia3(BaseAdapter):
    """Learned scales on keys, values and the feed-forward layer."""

    type: Literal["ia3"] = key("ia3", "The kind of adapter.")
    feedforward_modules: Targets = key(None, "Which of the target modules are feed-forward layers.")
    init_ia3_weights: bool = key(True, "Start with scales of 1.")


class Vera(BaseAdapter):
    """Shared random factors with learned scales."""

    type: Literal["vera"] = key("vera", "The kind of adapter.")
    r: Int = key(256, "Rank of the shared factors.", ge=1)
    dropout: Float = key(0.0, "Dropout before the update.", ge=0, lt=1)
    d_initial: Float = key(0.1, "Start of the scale vector d.", gt=0)
    projection_prng_key: Int = key(0, "Seed of the shared factors.", ge=0)
    save_projection: bool = key(True, "Save the shared factors too, so that another version of torch reads the same.")


class Loha(BaseAdapter):
    """Low-rank Hadamard products."""

    type: Literal["loha"] = key("loha", "The kind of adapter.")
    r: Int = key(8, "Rank of the update.", ge=1)
    alpha: Int = key(8, "Scale of the update is alpha / r.", ge=1)
    rank_dropout: Float = key(0.0, "Dropout over ranks.", ge=0, lt=1)
    module_dropout: Float = key(0.0, "Share of steps in which a layer's update is left out.", ge=0, lt=1)


class Lokr(Loha):
    """Low-rank Kronecker products."""

    type: Literal["lokr"] = key("lokr", "The kind of adapter.")  # type: ignore[assignment]
    decompose_both: bool = key(False, "Decompose the left factor too.")
    decompose_factor: Int = key(-1, "Size of the left factor; -1: chosen.", ge=-1)


class Oft(BaseAdapter):
    """Orthogonal rotations of the weights."""

    type: Literal["oft"] = key("oft", "The kind of adapter.")
    r: Int = key(8, "Number of blocks a layer; 0: from oft_block_size.", ge=0)
    oft_block_size: Int = key(0, "Size of a block; 0: from r.", ge=0)
    module_dropout: Float = key(
        0.0, "Only 0: PEFT takes a share of blocks to leave out and leaves none out.", ge=0, lt=1
    )
    coft: bool = key(False, "Keep rotations near the identity.")
    eps: Float = key(6e-5, "How near, with coft.", gt=0)
    block_share: bool = key(False, "Share the rotation between blocks.")

    @model_validator(mode="after")
    def _drops_nothing(self) -> Oft:
        if self.module_dropout:
            raise Conflict(
                "module_dropout has no effect: PEFT's oft makes a layer that drops and never calls it",
                received=f"module_dropout: {self.module_dropout:g}",
                allowed="0; boft_dropout with type: boft",
                fix="leave module_dropout out",
            )
        return self


class Boft(BaseAdapter):
    """Butterfly-factorised orthogonal rotations."""

    type: Literal["boft"] = key("boft", "The kind of adapter.")
    boft_block_size: Int = key(4, "Size of a block; 0: from boft_block_num.", ge=0)
    boft_block_num: Int = key(0, "Number of blocks; 0: from boft_block_size.", ge=0)
    boft_n_butterfly_factor: Int = key(1, "Number of butterfly factors.", ge=1)
    boft_dropout: Float = key(0.0, "Share of blocks left out in a step.", ge=0, lt=1)


class LnTuning(BaseAdapter):
    """Trains the normalisation layers only."""

    type: Literal["ln_tuning"] = key("ln_tuning", "The kind of adapter.")


Adapter = Annotated[
    Lora | AdaLora | Ia3 | Vera | Loha | Lokr | Oft | Boft | LnTuning,
    Field(discriminator="type"),
]
KINDS: tuple[str, ...] = tuple(one.model_fields["type"].default for one in get_args(get_args(Adapter)[0]))

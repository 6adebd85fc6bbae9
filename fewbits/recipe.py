"""Recipe: everything that a run is made of, as one validated value; YAML on disk, ``key=value`` on the command line."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from transformers.trainer_utils import SchedulerType

from fewbits.convert import Rule
from fewbits.kmeans import require_codebook
from fewbits.naming import did_you_mean
from fewbits.objectives import Objective
from fewbits.optim import VarianceReduction
from fewbits.optim.build import check_optimizer_name, is_schedule_free
from fewbits.optim.codebooks import CodebookFit
from fewbits.optim.zeroth_order import check_beside_zeroth_order, gradient_from_dict

InitMethod = Literal["rtn", "gptq", "adaround", "awq", "hqq", "kmeans", "lapq", "signround", "block_ap"]
"""Post-training methods that can start a run; a test holds it against :data:`fewbits.ptq.METHODS`."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RuleSpec(_Part):
    """One rule as text: see :class:`fewbits.Rule`."""

    pattern: str = "*"
    scheme: str | dict[str, Any] = "W2A16G64"
    options: dict[str, Any] = Field(default_factory=dict, description="overrides for Scheme.parse, e.g. rule: absmean")
    surrogate: str | dict[str, Any] = "ste"
    embeddings: bool = False
    drive: str | dict[str, Any] | None = None
    activation: str | dict[str, Any] | None = Field(
        default=None, description="inputs of the layers: A8, or fields of fewbits.activations.ActivationScheme"
    )
    kv_cache: str | dict[str, Any] | None = Field(default=None, description="keys and values: KV4, or such fields")
    differentiate_scale: bool = Field(default=False, description="let the gradient pass through dynamic scales")
    parametrization: str | dict[str, Any] | None = Field(default=None, description="low_rank or tanh; None: none")

    def build(self) -> Rule:
        """The rule itself."""
        from fewbits.activations import read_spellings, split_scheme
        from fewbits.drives import drive_from_dict
        from fewbits.parametrizations import parametrization_from_dict
        from fewbits.rotations import Rotation
        from fewbits.scheme import Scheme
        from fewbits.surrogates import surrogate_from_dict

        options = dict(self.options)
        if isinstance(options.get("rotation"), str):
            options["rotation"] = Rotation(kind=options["rotation"])
        elif isinstance(options.get("rotation"), dict):
            options["rotation"] = Rotation(**options["rotation"])
        if isinstance(self.scheme, dict):
            if options:
                raise ValueError("options go with a scheme given as text; put them into the scheme's mapping instead")
            scheme, activation, kv_cache = Scheme.from_dict(self.scheme), None, None
        else:
            weights, activation, kv_cache = split_scheme(self.scheme)
            scheme = Scheme.parse(weights, **options)
        return Rule(
            pattern=self.pattern,
            scheme=scheme,
            surrogate=surrogate_from_dict(self.surrogate),
            embeddings=self.embeddings,
            drive=None if self.drive is None else drive_from_dict(self.drive),
            activation=read_spellings("activation", activation, self.activation),
            kv_cache=read_spellings("kv_cache", kv_cache, self.kv_cache),
            differentiate_scale=self.differentiate_scale,
            parametrization=None if self.parametrization is None else parametrization_from_dict(self.parametrization),
        )


class DataSpec(_Part):
    """Where the text comes from.

    ``source``: ``embedded`` (the standard library's documentation), ``self`` (samples of the teacher), ``text`` (a file
    or folder at ``path``), ``traces`` (a .jsonl file at ``path`` of objects with prompt and answer, one a row of
    ``block_size``; loss and scores count answers only) or ``dataset`` (``path`` for ``datasets.load_dataset``, with
    ``name``, ``split``,
    ``column``).
    """

    source: Literal["embedded", "self", "text", "dataset", "traces"] = "embedded"
    path: str | None = None
    name: str | None = None
    split: str = "train"
    column: str = "text"
    eval_path: str | None = Field(
        default=None, description="text file or folder to evaluate on; else a part is held out"
    )
    block_size: int = Field(default=256, ge=2)
    max_tokens: int | None = Field(default=None, ge=1)
    eval_tokens: int = Field(default=16_384, ge=2)
    holdout: float = Field(default=0.1, gt=0, lt=1)

    @model_validator(mode="after")
    def _path_where_needed(self) -> DataSpec:
        if (self.source in ("text", "dataset", "traces")) != (self.path is not None):
            raise ValueError(
                f"data.path={self.path!r} with data.source={self.source!r}: text, dataset and traces need a path"
            )
        if self.source == "self" and self.max_tokens is None:
            raise ValueError("data.source='self' needs data.max_tokens: how many tokens to sample")
        return self


class VarianceReductionSpec(_Part):
    """A control variate, see :class:`fewbits.optim.VarianceReduction`; the seed is the recipe's."""

    form: Literal["none", "l_svrg", "svrg", "sarah", "saga"] = "l_svrg"
    probability: float = Field(default=1e-3, gt=0, le=1, description="of a new anchor at each step; l_svrg")
    interval: int = Field(default=1000, ge=1, description="steps between exact reference gradients; svrg and sarah")
    num_reference_batches: int = Field(default=16, ge=1, description="batches of the reference gradient")

    def build(self, seed: int) -> VarianceReduction:
        """The settings of the optimizer's wrapper."""
        return VarianceReduction(form=self.form, probability=self.probability, interval=self.interval, seed=seed)


class TrainSpec(_Part):
    """How it is trained; names are those of ``transformers.TrainingArguments`` where one exists."""

    max_steps: int = Field(default=200, ge=0, description="0: no training, the start that `init` gives is the result")
    batch_size: int = Field(default=8, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    scale_learning_rate: float | None = Field(default=None, ge=0)
    rest_learning_rate: float | None = Field(default=None, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    lr_scheduler_type: str = "cosine"
    warmup_steps: int = Field(default=10, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0)
    optim: str = Field(default="adamw_torch", description="of latent weights: a name of TrainingArguments, muon, lion")
    rest_optim: str | None = Field(default=None, description="of all but latent weights; None: the same")
    optim_options: dict[str, Any] = Field(default_factory=dict, description="of optim, e.g. momentum: 0.9")
    save_steps: int | None = Field(default=None, ge=1)
    save_total_limit: int | None = Field(default=2, ge=1)
    logging_steps: int = Field(default=10, ge=1)
    telemetry_interval: int = Field(default=50, ge=1)
    telemetry_calibration: bool = Field(
        default=False, description="record how well the gain predicts the moves of the deployed weights"
    )
    window_interval: int | None = Field(
        default=None, ge=1, description="steps between looks at every code, for windows.json; None looks at none"
    )
    variance_reduction: VarianceReductionSpec | None = None
    activation_checkpointing: bool = False
    gradient: str | dict[str, Any] = Field(default="backprop", description="or zeroth_order, with its options")
    bf16: bool = False
    activation_noise: float = Field(default=0.0, ge=0, le=1, description="probability of FPQ's feature perturbation")
    activation_noise_bits: int = Field(default=8, ge=2, le=16, description="whose step is the width of the noise")
    ema_decay: float | None = Field(default=None, ge=0, lt=1, description="ship the running mean of the weights")
    keep_best: bool = Field(default=False, description="ship the iterate that deployed best on text held out for it")
    keep_best_interval: int = Field(default=50, ge=1, description="steps between looks")
    keep_best_tokens: int = Field(default=8192, ge=2, description="taken from the end of the training text")
    freeze: list[str] = Field(default_factory=list, description="patterns of parameter names that stay fixed")

    @model_validator(mode="after")
    def _gradient_exists(self) -> TrainSpec:
        if gradient_from_dict(self.gradient) is not None:
            check_beside_zeroth_order(
                optim=self.optim,
                rest_optim=self.rest_optim,
                optim_options=self.optim_options,
                max_grad_norm=self.max_grad_norm,
                checkpointing=self.activation_checkpointing,
            )
        return self

    @model_validator(mode="after")
    def _optimizers_exist(self) -> TrainSpec:
        for name in (self.optim, self.rest_optim):
            if name is not None:
                check_optimizer_name(name)
        schedules = [str(member.value) for member in SchedulerType]
        if self.lr_scheduler_type not in schedules:
            near = did_you_mean(self.lr_scheduler_type, schedules)
            raise ValueError(f"lr_scheduler_type={self.lr_scheduler_type!r} is unknown; {near}use one of {schedules}")
        if is_schedule_free(self.optim) and self.ema_decay is not None:
            raise ValueError(f"train.ema_decay with train.optim={self.optim!r}, which ships an average already")
        if is_schedule_free(self.optim) and self.lr_scheduler_type != "constant":
            raise ValueError(
                f"train.optim={self.optim!r} needs train.lr_scheduler_type='constant' (got "
                f"{self.lr_scheduler_type!r}); train.warmup_steps still counts, the optimizer has its own warm-up"
            )
        return self


class ObjectiveSpec(_Part):
    """Weights of the loss, see :class:`fewbits.objectives.Objective`."""

    cross_entropy: float = Field(default=0.0, ge=0)
    kl: float = Field(default=1.0, ge=0)
    temperature: float = Field(default=1.0, gt=0)
    features: float = Field(default=0.0, ge=0)
    feature_layers: list[int] | None = None
    consistency: float = Field(default=0.0, ge=0)
    consistency_decay: float = Field(default=0.999, ge=0, lt=1)
    consistency_dropout: float = Field(default=0.1, ge=0, lt=1)

    def build(self) -> Objective:
        """The objective itself."""
        return Objective(**self.model_dump())


class CodebookSpec(_Part):
    """When codebooks are fitted by k-means, see :class:`fewbits.optim.CodebookFit`."""

    step: int = Field(default=0, ge=0, description="optimizer steps in full precision before the first fit")
    refit_interval: int | None = Field(default=None, ge=1, description="None: fit once and freeze")
    fisher: bool = Field(default=False, description="weigh by Adam's second moment")

    def build(self, seed: int = 0) -> CodebookFit:
        """The fit itself."""
        return CodebookFit(step=self.step, refit_interval=self.refit_interval, fisher=self.fisher, seed=seed)


class Recipe(_Part):
    """A whole run.

    Example:
        >>> Recipe.parse("rules: [{scheme: W1.58A16G256}]", ["train.max_steps=50"]).train.max_steps
        50
    """

    model: str = Field(default="embedded", description="'embedded', 'smollm2', a local folder or a hub id")
    teacher: str | None = Field(
        default=None, description="None: the model itself before quantization; or a folder of fewbits teach"
    )
    trust_remote_code: bool = False
    target: str = Field(default="hf", description="the engine format that must hold the result without loss")
    rules: list[RuleSpec] = Field(default_factory=lambda: [RuleSpec()], min_length=1)
    ignore: list[str] | None = None
    init: InitMethod = Field(default="rtn", description="post-training method that makes the start, on data's text")
    init_options: dict[str, Any] = Field(default_factory=dict, description="see fewbits.ptq.options_of and apply_ptq")
    data: DataSpec = DataSpec()
    objective: ObjectiveSpec = ObjectiveSpec()
    codebooks: CodebookSpec | None = Field(default=None, description="fit the codebooks of schemes such as W2KG64")
    train: TrainSpec = TrainSpec()
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _parts_build(self) -> Recipe:
        from fewbits.grids import Codebook

        grids = []
        for i, rule in enumerate(self.rules):
            try:
                scheme = rule.build().scheme
                if self.init == "kmeans":
                    require_codebook(scheme, "init is kmeans, but")
            except ValueError as error:
                raise ValueError(f"rules.{i}: {error}") from None
            grids.append(scheme.grid)
        self.objective.build()
        if self.codebooks is not None:
            self.codebooks.build()
            if not any(isinstance(grid, Codebook) for grid in grids):
                raise ValueError("codebooks are to be fitted, but no rule has one; use a scheme such as W2KG64")
            if self.init == "kmeans":
                raise ValueError("init: kmeans beside codebooks, whose first fit would start anew; drop one of them")
        return self

    @classmethod
    def parse(cls, text: str, overrides: Sequence[str] = ()) -> Recipe:
        """Read YAML and apply ``key=value`` overrides (dotted keys, list indices as numbers, YAML values).

        Raises:
            ValueError: for YAML that is not a mapping, unknown keys (near names are listed), or values out of range.
        """
        try:
            data = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ValueError(f"the recipe is not YAML: {error}") from None
        if data is None:
            data = {}
        if not isinstance(data, dict):
            raise ValueError(f"a recipe is a mapping of keys; got {type(data).__name__}")
        for override in overrides:
            _apply_override(data, override)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ValueError(explain(error)) from None

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a YAML file, or a shipped recipe by its name.

        Raises:
            ValueError: if neither exists.
        """
        path = Path(path)
        if not path.is_file() and str(path) in shipped_recipes():
            text = shipped_recipes()[str(path)]
        elif path.is_file():
            text = path.read_text(encoding="utf-8")
        else:
            hint = did_you_mean(path, shipped_recipes()) or f"shipped recipes: {', '.join(shipped_recipes())}"
            raise ValueError(f"recipe {str(path)!r} is neither a file nor a shipped recipe; {hint.strip()}")
        return cls.parse(text, overrides)

    def to_yaml(self) -> str:
        """Every field written out, so that a run folder says what ran even if defaults change."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def shipped_recipes() -> dict[str, str]:
    """Name to YAML text of every recipe in the package."""
    folder = resources.files("fewbits") / "recipes"
    found = [entry for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    return {entry.name[:-5]: entry.read_text(encoding="utf-8") for entry in sorted(found, key=lambda e: e.name)}


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ValueError(f"override {override!r} is not of the form key=value, e.g. train.max_steps=50")
    try:
        parsed = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"override {override!r}: the value is not YAML ({text}); close brackets and quotes") from None
    if isinstance(parsed, str):
        with contextlib.suppress(ValueError):  # YAML 1.1 reads 1e-3 as a string
            parsed = float(parsed)
    *parents, last = key.split(".")
    node: Any = data
    for i, part in enumerate(parents):
        if isinstance(node, list):
            node = node[_index(node, part, override)]
        else:
            if part == "rules" and not node.get("rules"):
                node["rules"] = [{}]
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        if not isinstance(node, dict | list):
            here = ".".join(parents[: i + 1])
            raise ValueError(f"override {override!r}: {here} is the value {node!r}, not a mapping; give all of {here}")
    if isinstance(node, list):
        node[_index(node, last, override)] = parsed
    else:
        node[last] = parsed


def _index(node: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ValueError(
            f"override {override!r}: {part!r} is not an index below {len(node)}; a list starts at 0, as in "
            "rules.0.scheme, and is lengthened by giving all of it"
        )
    return int(part)


def explain(error: ValidationError) -> str:
    """What is wrong with a recipe, or another value that pydantic checks, one line a fault."""
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden" and error.title == Recipe.__name__:
            message = _unknown_key(where)
        elif problem["type"] == "literal_error":
            near = did_you_mean(problem["input"], re.findall("'([^']+)'", problem["ctx"]["expected"]))
            message = f"{problem['input']!r} is unknown; {near}use {problem['ctx']['expected']}"
        else:
            message += f" (got {problem['input']!r})" if problem["type"] != "value_error" else ""
        lines.append(f"{where}: {message}" if where else message)
    return "\n".join(lines)


def _parts() -> dict[str, type[_Part]]:
    """The part of a recipe that stands under a key; the recipe itself under none."""
    return {
        "": Recipe, "rules": RuleSpec, "data": DataSpec, "objective": ObjectiveSpec, "codebooks": CodebookSpec,
        "train": TrainSpec, "train.variance_reduction": VarianceReductionSpec,
    }  # fmt: skip


def _unknown_key(where: str) -> str:
    """What to say of a key that its part lacks: near keys there, or where it belongs, and all that there are."""
    parent, _, key = re.sub(r"\.\d+\.", ".", where).rpartition(".")
    known = list(_parts().get(parent, Recipe).model_fields)
    elsewhere = {field: f"{path}.{field}" for path, part in _parts().items() if path for field in part.model_fields}
    if key in elsewhere:
        near = f"did you mean {elsewhere[key].replace('rules.', 'rules.0.')}? "
    else:
        near = did_you_mean(key, known)
    return f"unknown key; {near}known keys: {', '.join(known)}"

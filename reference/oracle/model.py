"""Checking a whole GPT-2: logits, loss, every gradient, and the losses of a short training run.

To the oracle a model is an op whose inputs are its parameters: `reference.GPT` is its formula, and
the budgets are the spread of that same model under the legal arithmetics. The candidate gets the
parameters as a Hugging Face directory of a small GPT-2. Normal values of `scale` are added to
gains of 1 and to zeros elsewhere.

    model = load(directory).to(device, dtype);   logits, loss = model(idx, targets)

The training run is torch.optim.AdamW for the candidate and `reference.train` for the reference,
with `OPTIMISER` on every parameter and a new batch for every step. Parameters stay in float32.

Source of the model: Radford et al. 2019. Source of the optimiser: Loshchilov and Hutter 2019.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from .._cross_entropy import cross_entropy
from .._gpt import GPT
from .._rounding import Rounded
from .._training import train
from .adapters import Answer, TorchAdapter, WrongForm
from .budget import legal_arithmetics, precision
from .check import name_of, time_limit
from .expectation import Content, Expectation
from .op import Case, Index, Input, Op
from .result import Report

OPTIMISER = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}

_N_LAYER = 2
# P is n_positions, S the three parts of c_attn: each part's rows have a budget of their own
_LAYER = {
    "ln_1.weight": "C", "ln_1.bias": "C",
    "attn.c_attn.weight": "C S C", "attn.c_attn.bias": "S C",
    "attn.c_proj.weight": "C C", "attn.c_proj.bias": "C",
    "ln_2.weight": "C", "ln_2.bias": "C",
    "mlp.c_fc.weight": "C F", "mlp.c_fc.bias": "F",
    "mlp.c_proj.weight": "F C", "mlp.c_proj.bias": "C",
}  # fmt: skip
_PARAMETERS = {
    "wte.weight": "V C",
    "wpe.weight": "P C",
    **{f"h.{i}.{name}": shape for i in range(_N_LAYER) for name, shape in _LAYER.items()},
    "ln_f.weight": "C",
    "ln_f.bias": "C",
    "lm_head.weight": "V C",
}
_SIZES = {"B": 2, "T": 19, "V": 67, "C": 48, "P": 24, "F": 192, "S": 3}
_NOT_CHECKED = (
    "ignored targets, attention masks, caches, dropout in training: the cases have none",
    "memory and layouts: they are checked op by op",
)


def check_model(
    load,
    *,
    dtypes=("float32",),
    device="cpu",
    backward=True,
    seed=0,
    timeout=None,
    steps=10,
    expression=None,
):
    """Check a model in torch against `gaugeblock.reference.GPT`.

    load:       load(directory: Path) -> nn.Module whose call model(idx, targets) returns
                (logits (B, T, V), loss), the mean cross-entropy of targets that are already
                shifted. Where logits are None, model(idx, None) must return (logits, None).
                `named_parameters` has Hugging Face's names, with or without `transformer.`;
                matrices may be transposed, as in nn.Linear. It is cast with .to(device, dtype).
    dtypes:     of float32, tf32, float16, bfloat16.
    backward:   False for logits and loss alone.
    steps:      of the training run, in float32 and tf32; 0 for none.
    expression: cases by name or option ("relu", "not untied").
    timeout:    seconds that one call, of load, of the model or of a step, may take.
    Raises ValueError for a dtype, device or expression that selects nothing.
    """
    checker = ModelChecker(
        load, dtypes=dtypes, device=device, backward=backward, seed=seed, steps=steps,
        expression=expression, watch=lambda: time_limit(timeout),
    )  # fmt: skip
    report = checker.report()
    for unit in checker.units:
        report.results += checker.examine(unit)
    return report


class ModelChecker:
    """A candidate and what is to be checked of it, in units of (case, dtype, layout).

    The arguments are those of `check_model`.
    """

    def __init__(
        self, load, *, dtypes, device, backward, seed, expression, watch, steps=10
    ):  # fmt: skip
        self.load, self.device, self.seed, self.backward = load, str(device), seed, backward
        self.not_checked = list(_NOT_CHECKED)
        self.torch = TorchAdapter(device)
        self.torch.watch = watch
        steps = steps if backward else 0
        self.training = _training(steps)
        cases = (*MODEL.cases, *self.training.cases[: 1 if steps else 0])
        self.op = replace(MODEL, cases=cases)
        selected = self.op.select("full", expression)
        self.units = [
            (case, p.name, "contiguous")
            for p in map(_precision, dtypes)
            for case in selected
            if self._has(case, p)
        ]
        if not self.units:
            raise ValueError(
                f"check: expression must select a case that {', '.join(dtypes)} has, "
                f"{expression!r} selects none"
            )

    def _has(self, case, p):
        if case in MODEL.cases or p.storage == np.float32:
            return True
        self.not_checked.append(
            f"training in {p.name}: it keeps float32 parameters, and where they are cast is the "
            "candidate's choice"
        )
        return False

    def report(self):
        return Report(self.op.name, name_of(self.load), self.device, self.seed, [],
                      self.not_checked)  # fmt: skip

    def examine(self, unit):
        """The results of one unit."""
        case, dtype, _ = unit
        if case not in MODEL.cases:
            expectation = _TrainingExpectation(self.training, case, dtype, self.seed, False)
            return expectation.judge(_Adapter(self.torch, _Training), self.load)
        jumps = self.backward and dtype != "float32" and "relu" in case.settings.values()
        if jumps:
            self.not_checked.append(
                f"{case.name}: gradients in {dtype}, roundings move values past 0, where the "
                "slope jumps"
            )
        backward = self.backward and not jumps
        expectation = _Expectation(MODEL, case, dtype, self.seed, backward)
        return expectation.judge(_Adapter(self.torch, _Evaluation), self.load)


def _precision(name):
    found = precision(name)
    if not found.gradients:
        raise ValueError(
            f"check: dtype must be one of float32, tf32, float16, bfloat16 for gpt, got {name!r}"
        )
    return found


def _forward(idx, targets, *parameters, **options):
    """-> logits, loss."""
    logits = _reference(parameters, options)(idx)
    return logits, cross_entropy(logits, targets)[0]


def _backward(dys, idx, targets, *parameters, **options):
    """The loss's gradients; no case has a gradient of the logits."""
    _, gradients = _reference(parameters, options).loss_and_gradients(idx, targets)
    return tuple(
        None if p is None else _without_noise(gradients[key].reshape(p.shape))
        for key, p in zip(_PARAMETERS, parameters)
    )


def _without_noise(g):
    """A float64 gradient whose exact zeros, as the keys' bias has them, are zeros again."""
    if isinstance(g, Rounded):
        return g
    return np.where(np.abs(g) > 2.0**-40 * np.abs(g).max(), g, 0.0)


def _train(idx, targets, *parameters, **options):
    """-> the loss before each step (steps, 1)."""
    model = _reference(parameters, options)
    # torch's AdamW decays whatever it is given
    optimiser = {**OPTIMISER, "decays": lambda key, w: True}
    return train(model, zip(idx, targets), **optimiser)[:, None]


def _reference(parameters, options):
    given = {k: p for k, p in zip(_PARAMETERS, parameters) if p is not None}
    return GPT(_config(given, options), {k: _matrix(k, p) for k, p in given.items()})


def _config(parameters, options):
    """The config.json of a model with these parameters."""
    (V, C), P = parameters["wte.weight"].shape, len(parameters["wpe.weight"])
    F = parameters["h.0.mlp.c_fc.weight"].shape[1]
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": _N_LAYER,
        "n_embd": C,
        "n_positions": P,
        "vocab_size": V,
        "n_inner": None if F == 4 * C else F,
        # transformers' defaults lie outside a small vocabulary
        "bos_token_id": None,
        "eos_token_id": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
        **options,
    }


def _matrix(key, p):
    """A parameter in the shape that the file has."""
    return p.reshape(*p.shape[:-2], -1) if ".c_attn." in key else p


def _case(name, scale=0.2, **settings):
    settings = {**_SIZES, "n_head": 3, **settings}
    values = {key: partial(_parameter, key, scale) for key in _PARAMETERS}
    if settings.get("tie_word_embeddings", True):
        values["lm_head.weight"] = lambda *_: None
    return Case(name, values=values, **settings)


def _parameter(key, scale, drawn, dims, rng):
    """Normal values around the gain 1 of a norm, and around 0."""
    gain = ".ln_" in f".{key}" and key.endswith("weight")
    return scale * drawn + (1 if gain else 0)


# what a model must leave out when it is evaluated
_DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}

MODEL = Op(
    "gpt",
    reference=_forward,
    backward=_backward,
    inputs={
        "idx": Index("B T", below="V"),
        "targets": Index("B T", below="V"),
        **{key: Input(shape) for key, shape in _PARAMETERS.items()},
    },
    outputs={"logits": "B T V", "loss": ""},
    cases=[
        _case("plain", **_DROPOUT),
        _case("small_weights", scale=0.02),
        _case("gelu", activation_function="gelu"),
        # few values near 0, where a rounding changes the slope
        _case("relu", activation_function="relu", T=5, F=16),
        _case("untied", tie_word_embeddings=False),
        _case("unscaled", scale=0.1, scale_attn_weights=False),
        _case("scaled_by_layer", scale_attn_by_inverse_layer_idx=True),
        _case("narrow_ffn", F=80),
        _case("large_eps", layer_norm_epsilon=0.1),
        _case("whole_context", B=1, T=24),
        _case("one_token", B=3, T=1),
    ],
)


def _training(steps):
    """The op of a training run: batches and parameters in, the losses out."""
    batches = Index("steps B T", below="V")
    no_dropout = dict.fromkeys(_DROPOUT, 0.0)
    return replace(
        MODEL,
        reference=_train,
        backward=None,
        inputs={**MODEL.inputs, "idx": batches, "targets": batches},
        outputs={"losses": "steps one"},
        cases=[_case("training", steps=steps, **no_dropout)],
    )


class _Content(Content):
    @cached_property
    def legal(self):
        runs = _legal_arithmetics(self.expectation.precision)[: self.expectation.runs]
        return [self._legal(arithmetic) for arithmetic in runs]


class _Expectation(Expectation):
    """What a model must give; its budgets come from `runs` legal runs, all where None."""

    runs: int | None = None

    def _drawn(self, layout, draw):
        content = super()._drawn(layout, draw)
        return _Content(self, content.inputs, content.wide, content.dys)


class _TrainingExpectation(_Expectation):
    # a run takes as long as ten of one batch
    runs = 16


def _legal_arithmetics(precision):
    """Those of the ops, three in four of them with every `stored` value rounded.

    A model has dozens of these values, and most models round them all; runs that leave some out
    have the smaller errors.
    """
    return [
        replace(arithmetic, stores=(True,)) if number % 4 else arithmetic
        for number, arithmetic in enumerate(legal_arithmetics(precision))
    ]


class _Adapter:
    """Opens sessions with a candidate that is a model."""

    def __init__(self, torch, session):
        self.torch, self.session = torch, session

    def open(self, inputs, options, dys, layout, **_):
        return self.session(self.torch, inputs, options, dys is not None)


class _Session:
    """A directory with a model, and what is asked of the candidate that loads it."""

    def __init__(self, adapter, inputs, options, backward):
        self.adapter, self.torch, self.backward = adapter, adapter.torch, backward
        self.parameters = {k: inputs[k] for k in _PARAMETERS if inputs[k] is not None}
        self.config = _config(self.parameters, options)
        self.idx, self.targets = (
            self.torch.from_numpy(inputs[name]).to(adapter.device) for name in ("idx", "targets")
        )

    def damage(self):
        # the weights are read from files
        return []

    def run(self, load):
        with tempfile.TemporaryDirectory() as directory:
            weights = self._write(Path(directory))
            with self.adapter.watch():
                model = load(Path(directory))
            if not isinstance(model, self.torch.nn.Module):
                raise WrongForm(f"load must return an nn.Module, returned {type(model).__name__}")
            storage = next(iter(self.parameters.values())).dtype.name
            model = model.to(self.adapter.device, getattr(self.torch, storage))
            return self.answers(model, self._named(model, weights))

    def _write(self, directory):
        """config.json and model.safetensors; {key: float32 array}."""
        weights = {k: _matrix(k, p).astype(np.float32) for k, p in self.parameters.items()}
        (directory / "config.json").write_text(json.dumps(self.config | {"dtype": "float32"}))
        prefixed = {
            k if k.startswith("lm_head") else f"transformer.{k}": np.ascontiguousarray(w)
            for k, w in weights.items()
        }
        save_file(prefixed, directory / "model.safetensors", metadata={"format": "pt"})
        return weights

    def _named(self, model, weights):
        """{key: (parameter, whether it is transposed)} of the loaded model."""
        found = {
            name.removeprefix("transformer."): p
            for name, p in model.named_parameters(remove_duplicate=False)
        }
        head = None if "lm_head.weight" in weights else found.pop("lm_head.weight", None)
        for wrong, keys in (("lacks", weights.keys() - found), ("has", found.keys() - weights)):
            if keys:
                named = ", ".join(sorted(keys))
                raise WrongForm(f"named_parameters must give GPT-2's parameters, {wrong} {named}")
        if head is not None and head is not found["wte.weight"]:
            raise WrongForm("lm_head.weight must be wte.weight itself where the head is tied")
        named = {}
        for key, weight in weights.items():
            value = found[key].detach().double().cpu().numpy()
            fits = [np.array_equal(value, w) for w in (weight, weight.T)]
            if not any(fits):
                raise WrongForm(f"{key} must hold what the file holds, it does not")
            named[key] = found[key], not fits[0]
        return named

    def _call(self, model, idx, targets):
        """What the model returns: a pair."""
        returned = model(idx, targets)
        if not isinstance(returned, (tuple, list)) or len(returned) != 2:
            raise WrongForm(f"model must return (logits, loss), returned {type(returned).__name__}")
        return returned

    def _answer(self, tensor, what):
        if not isinstance(tensor, self.torch.Tensor):
            raise WrongForm(f"{what} must be a tensor, got {type(tensor).__name__}")
        if tensor.device.type != self.idx.device.type:
            raise WrongForm(f"{what} must be on {self.idx.device}, is on {tensor.device}")
        name = str(tensor.dtype).removeprefix("torch.")
        return Answer(tensor.detach().double().cpu().numpy().copy(), name)


class _Evaluation(_Session):
    """Logits, loss and gradients of one batch."""

    def answers(self, model, named):
        model.eval()
        with self.adapter.watch(), self.torch.set_grad_enabled(self.backward):
            logits, loss = self._call(model, self.idx, self.targets)
            if logits is None:
                logits, _ = self._call(model, self.idx, None)
            outputs = [self._answer(logits, "logits"), self._answer(loss, "loss")]
            if not self.backward:
                return outputs, []
            model.zero_grad()
            # a loss without a gradient path has zero gradients
            if loss.requires_grad:
                loss.sum().backward()
        return outputs, [self._gradient(key, *named[key]) for key in self.parameters]

    def _gradient(self, key, parameter, transposed):
        g = self.torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        answer = self._answer(g.T if transposed else g, f"the gradient of {key}")
        return Answer(answer.values.reshape(self.parameters[key].shape), answer.dtype)


class _Training(_Session):
    """The losses of a training run."""

    def answers(self, model, named):
        model.train()
        optimiser = self.torch.optim.AdamW(model.parameters(), **OPTIMISER)
        losses = []
        for idx, targets in zip(self.idx, self.targets):
            with self.adapter.watch():
                _, loss = self._call(model, idx, targets)
                losses.append(self._answer(loss, "loss"))
                optimiser.zero_grad()
                if loss.requires_grad:
                    loss.sum().backward()
                optimiser.step()
        values = np.array([answer.values.reshape(()) for answer in losses])[:, None]
        return [Answer(values, losses[-1].dtype)], []

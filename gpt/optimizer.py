"""AdamW on the kernel: the whole model clipped and stepped in three launches."""

from __future__ import annotations

from itertools import chain

import torch

from gaugeblock import kernels


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW with clipping by the global norm, on `gaugeblock.kernels.adamw`.

    max_norm:       gradients are scaled, as they are read, to a norm over all parameters of no more
                    than this. The norm is left in `grad_norm`, on the device; None where max_norm
                    is None or nothing has been done yet. The gradients themselves stay as they are.
    skip_nonfinite: a step whose norm is not finite changes neither parameters nor moments, without
                    a wait for the device; the step counts all the same.
    impl:           as for the kernels.

    The state of a parameter has torch's names and shapes, so that either optimiser loads what the
    other saved; torch's amsgrad and maximize are refused. Parameters of 16 bits have moments in
    float32 and "master", the weights in float32, beside them.
    """

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, *,
        max_norm=None, skip_nonfinite=False, impl="auto",
    ):  # fmt: skip
        # the norm is of all parameters: these are no options of a group
        self.max_norm, self.skip_nonfinite, self.impl = max_norm, skip_nonfinite, impl
        self.grad_norm = None
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def __getstate__(self):
        own = ("max_norm", "skip_nonfinite", "impl", "grad_norm")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:
            for name, only in _TORCH_ONLY.items():
                if group.get(name, only) != only:
                    raise ValueError(
                        f"AdamW: {name} must be {only}, got {group[name]}; use torch.optim.AdamW"
                    )

    @torch.no_grad()
    def step(self, closure=None):
        """One step of the parameters that have gradients; the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = [
            (p, self._state_of(p), group)
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        params, states, groups = map(list, zip(*found)) if found else ([], [], [])
        self.grad_norm = kernels.adamw(
            params,
            [p.grad for p in params],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [int(s["step"]) + 1 for s in states],
            [group["lr"] for group in groups],
            *([group["betas"][i] for group in groups] for i in (0, 1)),
            [group["eps"] for group in groups],
            [group["weight_decay"] for group in groups],
            master=[s.get("master") for s in states],
            max_norm=self.max_norm,
            skip_nonfinite=self.skip_nonfinite,
            impl=self.impl,
        )
        for s in states:
            s["step"] += 1
        return loss

    def _state_of(self, p):
        state = self.state[p]
        if not state:
            # as torch keeps it: on the host, where nothing waits for it
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            moments = {"dtype": torch.float32} if p.dtype.itemsize == 2 else {}
            state["exp_avg"] = torch.zeros_like(p, **moments)
            state["exp_avg_sq"] = torch.zeros_like(p, **moments)
        if p.dtype.itemsize == 2 and "master" not in state:
            state["master"] = p.detach().to(torch.float32, copy=True)
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict):
        """Load the state of either optimiser."""
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        own = chain.from_iterable(group["params"] for group in self.param_groups)
        for i, p in zip(saved, own):
            state, before = self.state.get(p), state_dict["state"].get(i)
            if not state:
                continue
            state["step"] = torch.as_tensor(before["step"], dtype=torch.float32).cpu().clone()
            if p.dtype.itemsize == 2:
                # torch rounds all floating state to the parameter's dtype
                for name in before.keys() & {"exp_avg", "exp_avg_sq", "master"}:
                    state[name] = before[name].to(p.device, torch.float32, copy=True)


# options of torch's that this optimiser does not have, and what they must be
_TORCH_ONLY = {"amsgrad": False, "maximize": False, "decoupled_weight_decay": True}

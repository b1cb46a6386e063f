"""transformers' GPT-2 as a model that the oracle can check.

It is right in float32. In 16 bits it is not: its tanh GELU rounds every step, and on a CPU torch
adds the gradients of a norm's parameters in 16 bits.

    python examples/transformers_model.py
    gaugeblock check gpt examples.transformers_model:Model.from_pretrained
"""

from torch.nn.functional import cross_entropy
from transformers import GPT2LMHeadModel


class Model(GPT2LMHeadModel):
    def forward(self, idx, targets=None):
        logits = super().forward(idx).logits
        if targets is None:
            return logits, None
        return logits, cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


if __name__ == "__main__":
    from gaugeblock.reference.oracle import check_model
    from gaugeblock.reference.report import print_report

    report = check_model(Model.from_pretrained)
    print_report(report)
    raise SystemExit(not report.passed)

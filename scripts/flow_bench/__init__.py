"""The methods that scripts/bench_flow.py trains and measures, a file each family; METHODS is the table's order."""

"""The parts of scripts/bench_decoding.py: its task sets, what runs on them, its peers."""

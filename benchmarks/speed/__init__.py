"""Speed and memory of the engine, as ratios within one run: `make bench-speed`."""

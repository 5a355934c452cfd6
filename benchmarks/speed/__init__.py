"""Parts of the speed benchmarks: the work both sides do, one worker per side, and the arithmetic of the report."""

"""Many runs: a multirun's leader, its jobs, and where they may train."""

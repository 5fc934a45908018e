"""The vopd teacher service: scores students' own completions for many training jobs."""

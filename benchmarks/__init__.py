"""What is timed: one file for each subject, each with `run(quick)` giving rows."""

"""What a run needs: data, models, training, evaluation, report. Imports powerprop, never the reverse."""

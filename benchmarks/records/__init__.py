"""What a merge from records loses against a calibration run, and what a record costs."""

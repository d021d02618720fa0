"""From where the pictures lie to batches on the device."""

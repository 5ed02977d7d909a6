"""What turns an embedding into integer codes, and codes into an estimate of it."""

"""What neural drafters are made of. No drafter lives here."""

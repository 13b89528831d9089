"""How good sparse attention is: closeness to full attention, and answers to questions."""

"""A vision-language model as pi(y | images, question)."""

"""The OpenAI API's wire format: requests in, answers and errors out, as its clients expect them."""

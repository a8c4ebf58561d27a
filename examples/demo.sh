#!/bin/sh
# From a published checkpoint to an answer in 4 bits: quantize, evaluate, answer, serve. Called by `make demo`.
set -eu
ATOM=${ATOM:-atom}
DEMO=${DEMO:-.demo}
TEXT=$(dirname "$0")/text
OUT=$DEMO/smollm2-w4a4
QUESTION="What is the capital of France, and what is it known for?"

say() { printf '\n== %s\n' "$1"; }
mkdir -p "$DEMO"
began=$(date +%s)

say "1. What would run: atom check smollm2 --scheme w4a4"
"$ATOM" check smollm2 --scheme w4a4 --windows 16 --window-length 512

say "2. Quantize SmolLM2-135M to W4A4 + KV4 with GPTQ on 16 windows of 512 tokens"
rm -rf "$OUT" "$OUT.partial"
"$ATOM" quantize smollm2 --scheme w4a4 --calib "$TEXT/calibration.txt" --windows 16 --window-length 512 --output "$OUT"

say "3. Perplexity on 8 windows of 1024 tokens, full precision and 4 bits"
"$ATOM" eval smollm2 --ppl "$TEXT/evaluation.txt" --window 1024 --limit 8 --output "$DEMO/fp.json"
"$ATOM" eval "$OUT" --ppl "$TEXT/evaluation.txt" --window 1024 --limit 8 --output "$DEMO/w4a4.json"
"$ATOM" report eval "$DEMO/fp.json" "$DEMO/w4a4.json"

say "4. The quantized model answers: $QUESTION"
"$ATOM" chat "$OUT" --prompt "$QUESTION" --max-new-tokens 60

say "5. The quantized model behind the OpenAI API: atom serve, and a client"
"$ATOM" serve "$OUT" --port 0 --kv-cache-bytes 256MiB --log-format json 2> "$DEMO/serve.log" &
server=$!
trap 'kill "$server" 2> /dev/null || true' EXIT
url=
until [ -n "$url" ]; do
    kill -0 "$server" 2> /dev/null || { cat "$DEMO/serve.log"; exit 1; }
    sleep 0.2
    url=$(sed -n 's/.*"serving .* at \(http:[^"]*\)".*/\1/p' "$DEMO/serve.log")
done
echo "serving at $url"
"$ATOM" chat "$url" --prompt "$QUESTION" --max-new-tokens 60
kill -TERM "$server"
wait "$server"
trap - EXIT
echo "SIGTERM: the server drained and ended with 0"

say "Done in $(($(date +%s) - began)) s. The checkpoint: $OUT; its report: atom report quant $OUT"

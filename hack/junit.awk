# From the output of libtest programs to one JUnit suite; prints "passed failed".
# Variables: suite, seconds, status (exit code of the run), out (file).
function escape(text) {
  gsub(/[^\t\n\r\x20-\xff]/, "?", text)
  gsub(/&/, "\\&amp;", text); gsub(/</, "\\&lt;", text); gsub(/>/, "\\&gt;", text); gsub(/"/, "\\&quot;", text)
  return text
}
/^test .* \.\.\. (ok|FAILED|ignored)/ {
  name = $2; result = $NF
  if ($0 ~ /\.\.\. ignored/) result = "ignored"
  order[++count] = name; results[count] = result
  next
}
/^---- .* stdout ----$/ { current = $2; next }
/^failures:$/ { current = "" }
current != "" { output[current] = output[current] $0 "\n" }
END {
  for (i = 1; i <= count; i++) {
    if (results[i] == "ok") passed++
    else if (results[i] == "FAILED") failed++
    else skipped++
  }
  # A program that did not compile, crashed or ran no test at all is a failure too.
  if (status != 0 && failed == 0) { failed++; order[++count] = suite "_ran_to_its_end"; results[count] = "FAILED" }
  if (passed + failed == 0) { failed++; order[++count] = suite "_has_tests"; results[count] = "FAILED" }
  printf "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites>\n<testsuite name=\"%s\" tests=\"%d\" failures=\"%d\" skipped=\"%d\" time=\"%d\">\n", escape(suite), count, failed, skipped, seconds > out
  for (i = 1; i <= count; i++) {
    printf "<testcase classname=\"%s\" name=\"%s\">", escape(suite), escape(order[i]) > out
    if (results[i] == "FAILED") printf "<failure message=\"failed\">%s</failure>", escape(output[order[i]]) > out
    if (results[i] == "ignored") printf "<skipped/>" > out
    print "</testcase>" > out
  }
  print "</testsuite>\n</testsuites>" > out
  print passed + 0, failed + 0
}

#!/usr/bin/env bash
# plot.sh: the loss curves of one or several runs, in the terminal and as an SVG file. Needs awk and nothing else.
#
#   bash scripts/plot.sh [-o FILE.svg] RUN...
#
# RUN is an --out directory of train_xlstm, or its log.jsonl. The SVG file (default RUN/loss.svg, for several runs
# loss.svg here) opens in any browser: thin lines are the training loss, lines with dots the validation loss. The
# training loss is averaged over equal stretches of steps; where a resumed run repeated steps, the last value counts.
# Exit code: 0, 2 when there is nothing to plot or the file cannot be written.
set -euo pipefail
export LC_ALL=C

die() { echo "plot.sh: $*" >&2; exit 2; }

SVG=''
RUNS=()
while [ $# -gt 0 ]; do
    case $1 in
        -o) [ $# -ge 2 ] || die "-o needs a file name"; SVG=$2; shift ;;
        -h | --help) sed -n '2,/^set -/{/^#/!d;s/^# \{0,1\}//;p;}' "$0"; exit 0 ;;
        -*) die "unknown flag $1; usage: bash scripts/plot.sh [-o FILE.svg] RUN..." ;;
        *) RUNS+=("$1") ;;
    esac
    shift
done
[ ${#RUNS[@]} -gt 0 ] || die "name a run, for example: bash scripts/plot.sh out/demo"

LOGS=()
for run in "${RUNS[@]}"; do
    log=$run
    [ ! -d "$run" ] || log=${run%/}/log.jsonl
    [ -f "$log" ] || die "$log: no such log; RUN is the directory given to --out"
    case $log in *=*) log=./$log ;; esac # awk would read NAME=VALUE as an assignment
    LOGS+=("$log")
done
if [ -z "$SVG" ]; then
    SVG=loss.svg
    [ ${#RUNS[@]} -gt 1 ] || SVG=$(dirname "${LOGS[0]}")/loss.svg
fi

TEMPORARY=$SVG.tmp.$$
(: >"$TEMPORARY") 2>/dev/null || die "cannot write $SVG; name another file with -o"
trap 'rm -f "$TEMPORARY"' EXIT

# One awk program: it reads every log, draws the terminal curve on stdout and writes the SVG file to the file svg.
awk -v svg="$TEMPORARY" -v columns=68 -v rows=18 '
# value(KEY): the number behind "KEY": in the line, or "" (null and nan too: such a step is left out)
function value(key,    text) {
    if (!match($0, "\"" key "\" *: *-?[0-9][0-9.eE+-]*")) return ""
    text = substr($0, RSTART, RLENGTH)
    sub(/^[^:]*: */, "", text)
    return text + 0
}
function name_of(path) {
    sub(/\/?log\.jsonl$/, "", path)
    sub(/^\.\//, "", path)
    return path == "" ? "." : path
}
function escape(text) {
    gsub(/&/, "\\&amp;", text); gsub(/</, "\\&lt;", text); gsub(/>/, "\\&gt;", text)
    return text
}

FILENAME != previous { previous = FILENAME; run++; label[run] = name_of(FILENAME) }
/"step" *:/ {
    step = value("step"); train = value("loss"); val = value("val_loss")
    if (step == "") next
    if (train != "") { if (!((run, step) in T)) tstep[run, ++nt[run]] = step; T[run, step] = train }
    if (val != "") { if (!((run, step) in V)) vstep[run, ++nv[run]] = step; V[run, step] = val }
    if ((train != "" || val != "") && step > last) last = step
}

# A resumed run may log earlier steps after later ones: insertion sort, cheap on what is almost sorted.
function sort_steps(s, n, r,    i, j, x) {
    for (i = 2; i <= n; i++) {
        x = s[r, i]
        for (j = i - 1; j >= 1 && s[r, j] > x; j--) s[r, j + 1] = s[r, j]
        s[r, j + 1] = x
    }
}
# The n values of run r as at most `most` points (px, py): means over equal stretches of steps. Returns their number.
function points(s, values, n, r, most,    i, b, bucket, count, np) {
    np = 0; bucket = -1
    for (i = 1; i <= n; i++) {
        b = last > 0 ? int(s[r, i] * most / (last + 1)) : 0
        if (b != bucket) { np++; bucket = b; px[np] = 0; py[np] = 0; count = 0 }
        count++
        px[np] += (s[r, i] - px[np]) / count
        py[np] += (values[r, s[r, i]] - py[np]) / count
    }
    return np
}
# Widens the axis low..high to the n points. The steep first 4 % of a run do not count for its top, else the curve of
# all other steps would lie flat at the bottom; they are drawn along the upper edge.
function spread(n,    i) {
    for (i = 1; i <= n; i++) {
        if (!seen || py[i] < low) low = py[i]
        if (!seen || (py[i] > high && (n < 25 || px[i] > last * 0.04))) high = py[i]
        seen = 1
    }
}
function capped(loss) { return loss > high ? high : loss }
# distance of axis marks: 1, 2 or 5 times a power of ten, about n of them
function mark_step(range, n,    unit) {
    unit = 1
    while (unit * 10 <= range / n) unit *= 10
    while (unit > range / n) unit /= 10
    return unit * 5 <= range / n ? unit * 10 : unit * 2 <= range / n ? unit * 5 : unit * 2
}

# ---- terminal
function put(n, mark,    i, c, r) {
    for (i = 1; i <= n; i++) {
        c = last > 0 ? int(px[i] / last * (columns - 1) + 0.5) : 0
        r = int((high - capped(py[i])) / (high - low) * (rows - 1) + 0.5)
        cell[r, c] = mark
    }
}
function terminal(    r, c, line, mark, tmark, vmark, legend) {
    for (r = 1; r <= run; r++) {
        tmark = run == 1 ? "." : substr("abcdefghijklmnopqrstuvwxyz", (r - 1) % 26 + 1, 1)
        vmark = run == 1 ? "o" : toupper(tmark)
        put(points(tstep, T, nt[r] + 0, r, columns), tmark)
        put(points(vstep, V, nv[r] + 0, r, 1000000), vmark)
        legend = legend sprintf("  %s train loss", tmark) (nv[r] ? sprintf(", %s val loss", vmark) : "")
        legend = legend (run == 1 ? "" : ": " label[r]) (r < run ? "\n" : "")
    }
    for (r = 0; r < rows; r++) {
        line = ""
        for (c = 0; c < columns; c++) line = line ((r, c) in cell ? cell[r, c] : " ")
        sub(/ +$/, "", line)
        mark = r % 4 == 0 || r == rows - 1 ? sprintf("%.3f", high - (high - low) * r / (rows - 1)) : ""
        printf "%7s |%s\n", mark, line
    }
    line = sprintf("%" columns "s", "")
    gsub(/ /, "-", line)
    printf "%7s +%s\n%7s  0%" (columns - 1) "s\n", "", line, "", "step " last
    print legend
}

# ---- SVG
function emit(text) { print text > svg }
function X(step) { return sprintf("%.1f", 70 + (last > 0 ? step / last : 0) * 700) }
function Y(loss) { return sprintf("%.1f", 20 + (high - capped(loss)) / (high - low) * 400) }
function polyline(n, color, style,    i, path) {
    for (i = 1; i <= n; i++) path = path " " X(px[i]) "," Y(py[i])
    if (n) emit(sprintf("<polyline fill=\"none\" stroke=\"%s\" %s points=\"%s\"/>", color, style, substr(path, 2)))
}
function axes(    v, d) {
    d = mark_step(high - low, 8)
    for (v = int(low / d) * d; v <= high + d / 1000; v += d) {
        if (v < low - d / 1000) continue
        emit(sprintf("<path stroke=\"#ddd\" d=\"M70 %sH770\"/>", Y(v)))
        emit(sprintf("<text x=\"62\" y=\"%s\" text-anchor=\"end\" dy=\"4\">%.6g</text>", Y(v), v))
    }
    d = last > 8 ? mark_step(last, 8) : 1
    for (v = 0; v <= last; v += d) {
        emit(sprintf("<path stroke=\"#ddd\" d=\"M%s 20V420\"/>", X(v)))
        emit(sprintf("<text x=\"%s\" y=\"438\" text-anchor=\"middle\">%d</text>", X(v), v))
    }
    emit("<path fill=\"none\" stroke=\"black\" d=\"M70 20V420H770\"/>")
    emit("<text x=\"420\" y=\"458\" text-anchor=\"middle\">step</text>")
    emit("<text transform=\"translate(16 220) rotate(-90)\" text-anchor=\"middle\">loss, nats a token</text>")
}
function draw_svg(    r, i, n, color, c, text) {
    split("#1f77b4 #d62728 #2ca02c #9467bd #ff7f0e #8c564b #17becf #7f7f7f", color, " ")
    emit(sprintf("<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 800 %d\" font-family=\"sans-serif\" " \
        "font-size=\"13\">", 480 + 20 * run))
    emit("<rect width=\"100%\" height=\"100%\" fill=\"white\"/>")
    axes()
    for (r = 1; r <= run; r++) {
        c = color[(r - 1) % 8 + 1]
        n = points(tstep, T, nt[r] + 0, r, 600)
        polyline(n, c, "stroke-width=\"1.2\" stroke-opacity=\"" (nv[r] ? 0.55 : 1) "\"")
        n = points(vstep, V, nv[r] + 0, r, 1000000)
        polyline(n, c, "stroke-width=\"2\"")
        for (i = 1; i <= n; i++)
            emit(sprintf("<circle cx=\"%s\" cy=\"%s\" r=\"2.5\" fill=\"%s\"/>", X(px[i]), Y(py[i]), c))
        text = escape(label[r]) (nv[r] ? sprintf(" (val loss %.4f)", V[r, vstep[r, nv[r]]]) : "")
        emit(sprintf("<rect x=\"70\" y=\"%d\" width=\"24\" height=\"3\" fill=\"%s\"/>", 460 + 20 * r, c))
        emit(sprintf("<text x=\"102\" y=\"%d\">%s</text>", 465 + 20 * r, text))
    }
    emit("</svg>")
}

END {
    for (r = 1; r <= run; r++) {
        sort_steps(tstep, nt[r] + 0, r); sort_steps(vstep, nv[r] + 0, r)
        spread(points(vstep, V, nv[r] + 0, r, 1000000)); spread(points(tstep, T, nt[r] + 0, r, 600))
    }
    if (!seen) exit 1
    if (high - low < 1e-6) { high += 0.5; low -= 0.5 }
    terminal()
    draw_svg()
    if (close(svg)) exit 1
}' "${LOGS[@]}" || die "no losses in ${LOGS[*]}: has the first step been logged?"

mv -f "$TEMPORARY" "$SVG"
echo "wrote $SVG"

// kernel_times.cpp: where a program's time on the GPU goes, by kernel. A library that CUDA loads into any program that
// uses it; at exit it prints one table: kernels, copies and memsets with their time, the part of it in which nothing
// else ran, and how long the GPU was idle.
//
//   make build/libkernel_times.so
//   CUDA_INJECTION64_PATH=build/libkernel_times.so ./train_xlstmcu --model 164m --train ... --steps 20
//
//   KERNEL_TIMES_STEP=adamw_kernel    the kernel that ends a training step: the table then holds whole steps only, and
//                                     not the first 5 of them
//   KERNEL_TIMES_OUT=FILE             where the table goes; else to stderr. Under mpirun a %d becomes the rank
//   KERNEL_TIMES_TRACE=FILE           all of the last step: start and end in us, and name, a line each; %d as above
//
// It uses CUPTI, NVIDIA's interface for profilers. Kernels in CUDA graphs are seen one by one, which costs something:
// a step takes longer than without the library, most of it between kernels. The times of kernels stay as they are.
#include <cupti.h>
#include <cxxabi.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <string>
#include <vector>

static const size_t BUFFER_BYTES = (size_t)8 << 20, BUFFER_ALIGNMENT = 8;
static const size_t WARM_UP_STEPS = 5;

typedef struct {
    uint64_t start, end;  // ns
    int name;             // index into `names`
} Interval;

typedef struct {
    int name;
    uint64_t launches, total, alone;  // ns
} Row;

static std::mutex lock;  // of all below: CUPTI delivers from a thread of its own
static std::vector<Interval> intervals;
static std::vector<std::string> names;
static std::map<std::string, int> name_index;
static size_t untimed;  // records without times

static bool succeeds(CUptiResult status, const char *call) {
    if (status == CUPTI_SUCCESS) return true;
    const char *text = NULL;
    if (cuptiGetResultString(status, &text) != CUPTI_SUCCESS) text = "unknown error";
    fprintf(stderr, "kernel_times: %s: %s\n", call, text);
    return false;
}
#define SUCCEEDS(call) succeeds((call), #call)

// ----------------------------------------------------------------------------------------------------------------
// Records

// "void f<__nv_bfloat16, (int)2>(Args)" as "f<bf16, 2>"
static std::string short_name(const char *mangled) {
    int status = 0;
    char *full = abi::__cxa_demangle(mangled, NULL, NULL, &status);
    std::string name = full ? full : mangled;
    free(full);
    const char *const replace[][2] = {{"(anonymous namespace)::", ""},
                                      {"__nv_bfloat16", "bf16"},
                                      {"(int)", ""},
                                      {"(bool)0", "false"},
                                      {"(bool)1", "true"}};
    for (size_t k = 0; k < sizeof replace / sizeof *replace; k++)
        for (size_t at; (at = name.find(replace[k][0])) != std::string::npos;)
            name.replace(at, strlen(replace[k][0]), replace[k][1]);
    size_t begin = 0, end = name.size();  // outside of <>: the return type ends at a space, the name at a parenthesis
    int depth = 0;
    for (size_t k = 0; k < name.size() && end == name.size(); k++) {
        depth += (name[k] == '<') - (name[k] == '>');
        if (depth == 0 && name[k] == ' ') begin = k + 1;
        if (depth == 0 && name[k] == '(') end = k;
    }
    return name.substr(begin, end - begin);
}

static void add_interval(const std::string &name, uint64_t start, uint64_t end) {
    if (start == 0 || end < start) {
        untimed++;
        return;
    }
    auto found = name_index.emplace(name, (int)names.size());
    if (found.second) names.push_back(name);
    intervals.push_back({start, end, found.first->second});
}

static const char *copy_name(uint8_t kind) {
    switch (kind) {
        case CUPTI_ACTIVITY_MEMCPY_KIND_HTOD: return "[copy to the GPU]";
        case CUPTI_ACTIVITY_MEMCPY_KIND_DTOH: return "[copy to the host]";
        case CUPTI_ACTIVITY_MEMCPY_KIND_DTOD: return "[copy on the GPU]";
        default: return "[copy, other]";
    }
}

// What is read of a record lies at the same place in all versions of it since CUDA 9.
static void add_record(const CUpti_Activity *record, std::map<const char *, std::string> *known) {
    if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
        const CUpti_ActivityKernel9 *k = (const CUpti_ActivityKernel9 *)record;
        std::string &name = (*known)[k->name];  // CUPTI keeps one copy of a name
        if (name.empty()) name = short_name(k->name);
        add_interval(name, k->start, k->end);
    } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
        const CUpti_ActivityMemcpy5 *c = (const CUpti_ActivityMemcpy5 *)record;
        add_interval(copy_name(c->copyKind), c->start, c->end);
    } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY2) {
        const CUpti_ActivityMemcpyPtoP4 *c = (const CUpti_ActivityMemcpyPtoP4 *)record;
        add_interval("[copy to another GPU]", c->start, c->end);
    } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMSET) {
        const CUpti_ActivityMemset4 *m = (const CUpti_ActivityMemset4 *)record;
        add_interval("[memset]", m->start, m->end);
    }
}

static void CUPTIAPI buffer_requested(uint8_t **buffer, size_t *size, size_t *max_records) {
    *buffer = (uint8_t *)aligned_alloc(BUFFER_ALIGNMENT, BUFFER_BYTES);  // NULL: CUPTI drops records and counts them
    *size = *buffer ? BUFFER_BYTES : 0;
    *max_records = 0;  // as many as fit
}

static void CUPTIAPI buffer_completed(CUcontext, uint32_t, uint8_t *buffer, size_t, size_t valid) {
    std::lock_guard<std::mutex> guard(lock);
    std::map<const char *, std::string> known;
    CUpti_Activity *record = NULL;
    while (valid > 0 && cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) add_record(record, &known);
    free(buffer);
}

// ----------------------------------------------------------------------------------------------------------------
// The table

// Keeps what lies between the end of step WARM_UP_STEPS, *from, and that of the last; returns the number of steps: 0 if
// none were asked for, or there are too few.
static size_t keep_steps(const char *marker, uint64_t *from) {
    std::vector<uint64_t> ends;
    if (!marker) return 0;
    for (const Interval &i : intervals)
        if (names[i.name].find(marker) != std::string::npos) ends.push_back(i.end);
    if (ends.size() <= WARM_UP_STEPS) {
        fprintf(stderr, "kernel_times: KERNEL_TIMES_STEP=%s: %zu launches, more than %zu are needed; all is shown\n",
                marker, ends.size(), WARM_UP_STEPS);
        return 0;
    }
    const uint64_t to = ends.back();
    *from = ends[WARM_UP_STEPS - 1];
    std::vector<Interval> kept;
    for (const Interval &i : intervals)
        if (i.start >= *from && i.end <= to) kept.push_back(i);
    intervals = kept;
    return ends.size() - WARM_UP_STEPS;
}

// The time in which an interval is the only one, to the row of its name.
static void add_alone(std::vector<Row> *rows) {
    std::vector<std::pair<uint64_t, int>> marks;  // name + 1 begins, -(name + 1) ends
    for (const Interval &i : intervals) {
        marks.push_back({i.start, i.name + 1});
        marks.push_back({i.end, -(i.name + 1)});
    }
    std::sort(marks.begin(), marks.end());
    int64_t running = 0, sum = 0;  // sum: of name + 1 of all that run: of the one, if there is one
    for (size_t k = 0; k < marks.size(); k++) {
        if (running == 1 && sum > 0) (*rows)[(size_t)sum - 1].alone += marks[k].first - marks[k - 1].first;
        running += marks[k].second > 0 ? 1 : -1;
        sum += marks[k].second;
    }
}

static std::vector<Row> sum_rows(uint64_t *total) {
    std::vector<Row> rows(names.size(), Row{0, 0, 0, 0});
    *total = 0;
    for (size_t k = 0; k < rows.size(); k++) rows[k].name = (int)k;
    for (const Interval &i : intervals) {
        rows[i.name].launches++;
        rows[i.name].total += i.end - i.start;
        *total += i.end - i.start;
    }
    add_alone(&rows);
    std::sort(rows.begin(), rows.end(), [](const Row &a, const Row &b) {
        return a.total != b.total ? a.total > b.total : names[a.name] < names[b.name];
    });
    return rows;
}

// Idle time between intervals that are sorted by their start, in gaps up to `limits` long; `from` is where the first
// gap may begin.
enum { GAP_KINDS = 4 };
static const uint64_t gap_limits[GAP_KINDS] = {2000, 10000, 100000, UINT64_MAX};  // ns
static const char *const gap_names[GAP_KINDS] = {"up to 2 us", "2 to 10 us", "10 to 100 us", "longer"};

static uint64_t sum_gaps(uint64_t from, uint64_t counts[GAP_KINDS], uint64_t sums[GAP_KINDS]) {
    uint64_t busy_until = from, idle = 0;
    for (const Interval &i : intervals) {
        if (i.start > busy_until) {
            uint64_t gap = i.start - busy_until;
            int kind = 0;
            while (gap > gap_limits[kind]) kind++;
            counts[kind]++;
            sums[kind] += gap;
            idle += gap;
        }
        busy_until = std::max(busy_until, i.end);
    }
    return idle;
}

static void print_table(FILE *out) {
    const double ms = 1e-6;
    std::sort(intervals.begin(), intervals.end(), [](const Interval &a, const Interval &b) {
        return a.start != b.start ? a.start < b.start : a.end < b.end;
    });
    if (intervals.empty()) {
        fprintf(out, "kernel_times: nothing ran on the GPU\n");
        return;
    }
    uint64_t total, first = intervals[0].start, last = 0, counts[GAP_KINDS] = {0}, sums[GAP_KINDS] = {0};
    const size_t steps = keep_steps(getenv("KERNEL_TIMES_STEP"), &first);
    const std::vector<Row> rows = sum_rows(&total);
    for (const Interval &i : intervals) last = std::max(last, i.end);
    const uint64_t idle = sum_gaps(first, counts, sums), span = last - first;
    fprintf(out, "steps %zu\n", steps);
    fprintf(out, "span %.3f ms, busy %.3f ms, idle %.3f ms (%.1f %%)\n", ms * span, ms * (span - idle), ms * idle,
            span ? 100.0 * idle / span : 0.0);
    for (int k = 0; k < GAP_KINDS; k++)
        fprintf(out, "gaps %s: %llu, %.3f ms\n", gap_names[k], (unsigned long long)counts[k], ms * sums[k]);
    fprintf(out, "%9s %11s %11s %11s %7s  %s\n", "launches", "total ms", "alone ms", "mean us", "share", "kernel");
    for (const Row &r : rows) {
        if (r.launches == 0) continue;
        fprintf(out, "%9llu %11.3f %11.3f %11.2f %6.2f%%  %s\n", (unsigned long long)r.launches, ms * r.total,
                ms * r.alone, 1e-3 * r.total / r.launches, total ? 100.0 * r.total / total : 0.0,
                names[r.name].c_str());
    }
}

// A file whose name may hold %d, for the rank of this process; NULL: none is wanted, or it cannot be written.
static FILE *open_named(const char *variable) {
    const char *path = getenv(variable), *rank = getenv("OMPI_COMM_WORLD_RANK");
    if (!path) return NULL;
    std::string name = path;
    size_t at = name.find("%d");
    if (at != std::string::npos) name.replace(at, 2, rank ? rank : "0");
    FILE *out = fopen(name.c_str(), "w");
    if (!out) perror(name.c_str());
    return out;
}

static void print_trace(FILE *out) {  // after print_table: the intervals are sorted
    const char *marker = getenv("KERNEL_TIMES_STEP");
    uint64_t ends[2] = {0, 0};  // of the last two steps
    for (const Interval &i : intervals)
        if (marker && names[i.name].find(marker) != std::string::npos && i.end > ends[1]) {
            ends[0] = ends[1];
            ends[1] = i.end;
        }
    for (const Interval &i : intervals)
        if (i.end > ends[0])
            fprintf(out, "%.3f %.3f %s\n", 1e-3 * (double)(int64_t)(i.start - ends[0]),
                    1e-3 * (double)(int64_t)(i.end - ends[0]), names[i.name].c_str());
}

static void finish(void) {
    SUCCEEDS(cuptiActivityFlushAll(1));  // if not, the table holds what came before
    std::lock_guard<std::mutex> guard(lock);
    const char *launcher = getenv("OMPI_COMM_WORLD_RANK") ? NULL : getenv("KERNEL_TIMES_OUT");
    if (intervals.empty() && launcher && strstr(launcher, "%d")) return;  // mpirun itself, which uses CUDA, too
    FILE *out = open_named("KERNEL_TIMES_OUT"), *trace = open_named("KERNEL_TIMES_TRACE");
    if (!out) out = stderr;
    size_t dropped = 0;
    if (cuptiActivityGetNumDroppedRecords(NULL, 0, &dropped) != CUPTI_SUCCESS) dropped = 0;
    if (dropped + untimed) fprintf(out, "kernel_times: %zu records are missing\n", dropped + untimed);
    print_table(out);
    if (out != stderr && fclose(out) != 0) perror("KERNEL_TIMES_OUT");
    if (!trace) return;
    print_trace(trace);
    if (fclose(trace) != 0) perror("KERNEL_TIMES_TRACE");
}

// CUDA calls this when it is initialised; 1: all is well.
extern "C" int InitializeInjection(void) {
    if (!SUCCEEDS(cuptiActivityRegisterCallbacks(buffer_requested, buffer_completed)) ||
        !SUCCEEDS(cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL)) ||
        !SUCCEEDS(cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMCPY)) ||
        !SUCCEEDS(cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMCPY2)) ||
        !SUCCEEDS(cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMSET)))
        return 0;
    if (atexit(finish) != 0) {
        fprintf(stderr, "kernel_times: atexit failed\n");
        return 0;
    }
    return 1;
}

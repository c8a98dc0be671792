// comm_tcp.h: messages between ranks over TCP, part of comm_peers.h: for ranks that torchrun, plain srun or a script
// has started. Each has its number, how many there are and where the first one is from environment variables:
//
//   RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT              torchrun; our port is the next one, theirs is taken
//   SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_STEP_NODELIST, SLURM_JOB_ID      srun without MPI
//
// Rank 0 collects where everyone listens and tells all; then each pair of ranks has two connections: one for messages,
// which is as good as a sign of life, and one for a farewell, a byte, which need not wait for what nobody has read.
#ifndef XLSTMC_COMM_TCP_H
#define XLSTMC_COMM_TCP_H

#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

static const uint32_t TCP_MAGIC = 0x786c7374;
static const double TCP_START_TIMEOUT = 120;  // seconds; --comm-timeout is not known yet

typedef struct {  // what a rank says of itself
    uint32_t magic;
    int rank, size, port;
    int farewell;      // which of the two connections this is
    char address[64];  // filled in by rank 0
    CommPeer peer;
} TcpHello;

typedef struct {
    int receive, rank;
    char *data;
    size_t left;
} TcpMessage;

static struct {
    int *sockets[2];  // [size] for messages, for farewells; -1: oneself
    TcpMessage *messages;
    int count, capacity;
    char *blocked;  // [2][size]
} tcp;

// ----------------------------------------------------------------------------------------------------------------
// Messages

static void tcp_post(int receive, int rank, int tag, void *data, size_t bytes, const char *what) {
    (void)tag, (void)what;
    if (tcp.count == tcp.capacity) {
        tcp.capacity = 2 * tcp.capacity + 16;
        tcp.messages = (TcpMessage *)realloc(tcp.messages, (size_t)tcp.capacity * sizeof *tcp.messages);
        if (!tcp.messages) die(EXIT_RUN, "out of memory: %d messages", tcp.capacity);
    }
    TcpMessage message = {receive, rank, (char *)data, bytes};
    tcp.messages[tcp.count++] = message;
}

// Moves what can be moved, each connection's messages in their order.
static int tcp_test(const char *what) {
    int open = 0;
    memset(tcp.blocked, 0, 2 * (size_t)comm.size);
    for (int k = 0; k < tcp.count; k++) {
        TcpMessage *m = &tcp.messages[k];
        char *blocked = &tcp.blocked[m->receive * comm.size + m->rank];
        while (m->left > 0 && !*blocked) {
            int socket = tcp.sockets[0][m->rank];
            ssize_t n = m->receive ? recv(socket, m->data, m->left, 0) : send(socket, m->data, m->left, MSG_NOSIGNAL);
            if (n > 0) m->data += n, m->left -= (size_t)n;
            else if (n < 0 && errno == EINTR) continue;
            else if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) *blocked = 1;
            else peer_fail_dead(what, m->rank);
        }
        open |= m->left > 0;
    }
    if (!open) tcp.count = 0;
    return !open;
}

static int tcp_missing(int k) {
    if (k >= tcp.count) return -2;
    return tcp.messages[k].receive && tcp.messages[k].left > 0 ? tcp.messages[k].rank : -1;
}

static void tcp_heed(void) {
    unsigned char code = 0;
    for (int r = 0; r < comm.size; r++) {
        if (r == comm.rank || recv(tcp.sockets[1][r], &code, 1, 0) != 1) continue;
        fflush(stderr);
        _exit(code);
    }
}

static int tcp_silent(void) { return -1; }

static void tcp_end_job(int code) {
    unsigned char byte = (unsigned char)code;
    for (int r = 0; r < comm.size; r++)
        if (r != comm.rank) (void)!send(tcp.sockets[1][r], &byte, 1, MSG_NOSIGNAL);
    if (comm_abort_data) comm_abort_data();
    _exit(code);
}

static void tcp_finish(void) {
    for (int r = 0; r < comm.size; r++)
        for (int k = 0; k < 2 && r != comm.rank; k++) close(tcp.sockets[k][r]);
}

// ----------------------------------------------------------------------------------------------------------------
// Start

static void tcp_failed(const char *call) { die(EXIT_RUN, "connecting the ranks: %s: %s", call, strerror(errno)); }

// Whole records, before connections are set not to wait
static void tcp_move(int socket, int receive, void *data, size_t bytes) {
    for (char *at = (char *)data; bytes > 0;) {
        ssize_t n = receive ? recv(socket, at, bytes, 0) : send(socket, at, bytes, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0)
            die(EXIT_RUN, "connecting the ranks: one of them is gone, or none came for %g s", TCP_START_TIMEOUT);
        at += n, bytes -= (size_t)n;
    }
}

static void tcp_options(int socket) {
    struct timeval limit = {(time_t)TCP_START_TIMEOUT, 0};
    int one = 1;
    if (setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one) != 0 ||
        setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit) != 0)
        tcp_failed("setsockopt");
}

static int tcp_listen(int port, int *bound) {
    struct sockaddr_in address;
    socklen_t size = sizeof address;
    int one = 1, s = socket(AF_INET, SOCK_STREAM, 0);
    memset(&address, 0, sizeof address);
    address.sin_family = AF_INET;
    address.sin_port = htons((uint16_t)port);
    if (s < 0 || setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) != 0) tcp_failed("socket");
    if (bind(s, (struct sockaddr *)&address, sizeof address) != 0)
        die(EXIT_USAGE, "port %d, where the ranks are to meet: %s; set MASTER_PORT to another number", port,
            strerror(errno));
    if (listen(s, 4096) != 0 || getsockname(s, (struct sockaddr *)&address, &size) != 0) tcp_failed("listen");
    *bound = ntohs(address.sin_port);
    return s;
}

static void tcp_accept(int listening, TcpHello *hello) {
    for (;;) {
        struct sockaddr_in from;
        socklen_t size = sizeof from;
        int s = accept(listening, (struct sockaddr *)&from, &size);
        if (s < 0 && errno == EINTR) continue;
        if (s < 0) die(EXIT_RUN, "connecting the ranks: not all came within %g s", TCP_START_TIMEOUT);
        tcp_options(s);
        tcp_move(s, 1, hello, sizeof *hello);
        if (hello->magic == TCP_MAGIC && hello->size == comm.size && hello->rank > comm.rank &&
            hello->rank < comm.size && tcp.sockets[hello->farewell != 0][hello->rank] < 0) {
            inet_ntop(AF_INET, &from.sin_addr, hello->address, sizeof hello->address);
            tcp.sockets[hello->farewell != 0][hello->rank] = s;
            return;
        }
        close(s);  // somebody else
    }
}

// Tries until the other side listens.
static void tcp_connect_one(int rank, const char *host, int port, const TcpHello *hello) {
    char service[16];
    struct addrinfo hints, *found = NULL;
    memset(&hints, 0, sizeof hints);
    hints.ai_family = AF_INET;
    hints.ai_socktype = SOCK_STREAM;
    format_into(service, sizeof service, "%d", port);
    for (double start = now_seconds();; comm_sleep(0.05)) {
        int s = -1, known = getaddrinfo(host, service, &hints, &found) == 0;
        if (known) s = socket(AF_INET, SOCK_STREAM, 0);
        if (known && s < 0) tcp_failed("socket");
        int connected = known && connect(s, found->ai_addr, found->ai_addrlen) == 0;
        if (known) freeaddrinfo(found);
        if (connected) {
            tcp_options(s);
            tcp_move(s, 0, (void *)hello, sizeof *hello);
            tcp.sockets[hello->farewell][rank] = s;
            return;
        }
        if (s >= 0) close(s);
        if (now_seconds() - start > TCP_START_TIMEOUT)
            die(EXIT_RUN, "rank %d at %s, port %d, does not answer%s", rank, host, port,
                known ? "" : ": no such host (MASTER_ADDR)");
    }
}

static void tcp_connect(int rank, const char *host, int port, const TcpHello *me) {
    TcpHello hello = *me;
    for (hello.farewell = 0; hello.farewell < 2; hello.farewell++) tcp_connect_one(rank, host, port, &hello);
}

// The first host of a list as Slurm writes them: node[03-07,11],other -> node03
static void first_host(const char *list, char *host, size_t size) {
    size_t prefix = strcspn(list, "[,"), digits = list[prefix] == '[' ? strspn(list + prefix + 1, "0123456789") : 0;
    format_into(host, size, "%.*s%.*s", (int)prefix, list, (int)digits, digits ? list + prefix + 1 : "");
}

// Where the ranks meet, from the launcher's variables; 0: they say nothing of several ranks.
static int tcp_environment(char *host, size_t host_size, int *port) {
    const char *rank = getenv("RANK"), *address = getenv("MASTER_ADDR"), *nodes = getenv("SLURM_STEP_NODELIST");
    if (comm_env("WORLD_SIZE") > 1 && rank && address) {
        comm.size = comm_env("WORLD_SIZE");
        comm.rank = atoi(rank);
        format_into(host, host_size, "%s", address);
        *port = getenv("MASTER_PORT") ? comm_env("MASTER_PORT") + 1 : 29501;
    } else if (comm_env("SLURM_STEP_NUM_TASKS") > 1 && getenv("SLURM_PROCID") && nodes) {
        comm.size = comm_env("SLURM_STEP_NUM_TASKS");
        comm.rank = comm_env("SLURM_PROCID");
        first_host(address ? address : nodes, host, host_size);
        *port = getenv("MASTER_PORT") ? comm_env("MASTER_PORT") + 1 : 15000 + comm_env("SLURM_JOB_ID") % 15000;
    } else {
        return 0;
    }
    if (comm.rank < 0 || comm.rank >= comm.size || *port < 1 || *port > 65535)
        die(EXIT_USAGE, "RANK, WORLD_SIZE or MASTER_PORT: rank %d of %d, port %d; is that what the launcher set?",
            comm.rank, comm.size, *port);
    return 1;
}

static void tcp_start(void) {
    static const Carrier by_tcp = {tcp_post, tcp_test, tcp_missing, tcp_heed, tcp_silent, tcp_end_job, tcp_finish};
    char host[256];
    int port = 0, listening, mine;
    if (!tcp_environment(host, sizeof host, &port)) return;
    size_t size = (size_t)comm.size;
    for (int k = 0; k < 2; k++) tcp.sockets[k] = (int *)xcalloc(size, sizeof(int));
    tcp.blocked = (char *)xcalloc(size, 2);
    comm.peers = (CommPeer *)xcalloc(size, sizeof *comm.peers);
    TcpHello *all = (TcpHello *)xcalloc(size, sizeof *all), *me = &all[comm.rank];
    for (int r = 0; r < comm.size; r++) tcp.sockets[0][r] = tcp.sockets[1][r] = -1;
    listening = tcp_listen(comm.rank == 0 ? port : 0, &mine);
    tcp_options(listening);
    me->magic = TCP_MAGIC, me->rank = comm.rank, me->size = comm.size, me->port = mine, me->peer = peer_me();
    if (comm.rank == 0) {
        for (int k = 0; k < 2 * (comm.size - 1); k++) {
            TcpHello hello;
            tcp_accept(listening, &hello);
            all[hello.rank] = hello;
        }
        for (int r = 1; r < comm.size; r++) tcp_move(tcp.sockets[0][r], 0, all, size * sizeof *all);
    } else {
        TcpHello hello = *me, other;
        tcp_connect(0, host, port, &hello);
        tcp_move(tcp.sockets[0][0], 1, all, size * sizeof *all);
        for (int r = 1; r < comm.rank; r++) {  // rank 0 may know its own host by an address that only it can use
            int local = strncmp(all[r].address, "127.", 4) == 0 && strcmp(all[r].peer.host, hello.peer.host) != 0;
            tcp_connect(r, local ? host : all[r].address, all[r].port, &hello);
        }
        for (int k = 0; k < 2 * (comm.size - 1 - comm.rank); k++) tcp_accept(listening, &other);
    }
    close(listening);
    for (int r = 0; r < comm.size; r++) {
        comm.peers[r] = all[r].peer;
        for (int k = 0; k < 2 && r != comm.rank; k++)
            if (fcntl(tcp.sockets[k][r], F_SETFL, O_NONBLOCK) != 0) tcp_failed("fcntl");
    }
    free(all);
    peers_start(&by_tcp);
}

#endif

// A stand-in for NCCL in its non-blocking mode, between processes of one machine, over the stand-in's streams. Nothing is
// done at once: joining and what a group holds are taken up a little later, as the library may. A rank that does not come
// makes the others hang on their streams until their communicator is aborted.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <fcntl.h>
#include <mutex>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>
#include <vector>

namespace {

enum { SUCCESS = 0, SYSTEM = 2, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, IN_PROGRESS = 7 };
enum { INT8, UINT8, INT32, UINT32, INT64, UINT64, FLOAT16, FLOAT32, FLOAT64, BFLOAT16 };
enum class What { ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, BROADCAST };

constexpr size_t CHUNK = 1 << 20;
constexpr int MOST = 8;

struct Meeting {
    std::atomic<uint32_t> joined, arrived, turn;
    alignas(64) unsigned char staged[MOST][CHUNK];
};

struct Comm {
    Meeting* meeting;
    int rank, size;
    std::atomic<int> state{IN_PROGRESS};
    std::atomic<bool> aborted{false};
};

struct Operation {
    What what;
    const unsigned char* from;
    unsigned char* to;
    size_t count;
    int type, root;
    Comm* comm;
    void* stream;
};

struct Id {
    char name[128];
};

thread_local int depth = 0;
thread_local std::vector<Operation> group;

size_t size_of(int type) {
    switch (type) {
    case UINT8: return 1;
    case FLOAT16: case BFLOAT16: return 2;
    case FLOAT32: return 4;
    case FLOAT64: return 8;
    default: return 0;
    }
}

// All ranks come here, or it is false.
bool meet(Comm& comm) {
    Meeting& meeting = *comm.meeting;
    uint32_t turn = meeting.turn;
    if (meeting.arrived.fetch_add(1) + 1 == uint32_t(comm.size)) {
        meeting.arrived = 0;
        meeting.turn++;
        return true;
    }
    while (meeting.turn == turn) {
        if (comm.aborted) {
            return false;
        }
        std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
    return true;
}

double number(const unsigned char* at, int type) {
    switch (type) {
    case FLOAT32: { float x; memcpy(&x, at, 4); return x; }
    case FLOAT64: { double x; memcpy(&x, at, 8); return x; }
    case FLOAT16: { _Float16 x; memcpy(&x, at, 2); return double(x); }
    case BFLOAT16: { uint32_t bits = 0; memcpy(reinterpret_cast<char*>(&bits) + 2, at, 2); float x; memcpy(&x, &bits, 4); return x; }
    default: return 0;
    }
}

void put_number(unsigned char* at, int type, double sum) {
    switch (type) {
    case FLOAT32: { float x = float(sum); memcpy(at, &x, 4); break; }
    case FLOAT64: memcpy(at, &sum, 8); break;
    case FLOAT16: { _Float16 x = _Float16(sum); memcpy(at, &x, 2); break; }
    // Cut off: the sums that are looked at are exact.
    case BFLOAT16: { float x = float(sum); memcpy(at, reinterpret_cast<char*>(&x) + 2, 2); break; }
    }
}

void sum_staged(Comm& comm, unsigned char* to, size_t bytes, int type) {
    for (size_t at = 0; at < bytes; at += size_of(type)) {
        double sum = 0;
        for (int rank = 0; rank < comm.size; rank++) {
            sum += number(comm.meeting->staged[rank] + at, type);
        }
        put_number(to + at, type, sum);
    }
}

// `from` of this rank goes into its place; `then` uses everybody's.
template <class F> bool chunked(Comm& comm, const unsigned char* from, size_t bytes, F then) {
    for (size_t at = 0; at < bytes; at += CHUNK) {
        size_t some = bytes - at < CHUNK ? bytes - at : CHUNK;
        if (from) {
            memcpy(comm.meeting->staged[comm.rank], from + at, some);
        }
        if (!meet(comm)) {
            return false;
        }
        then(at, some);
        if (!meet(comm)) {
            return false;
        }
    }
    return true;
}

void run(const Operation& o) {
    Comm& comm = *o.comm;
    size_t bytes = o.count * size_of(o.type);
    switch (o.what) {
    case What::ALL_GATHER:
        chunked(comm, o.from, bytes, [&](size_t at, size_t some) {
            for (int rank = 0; rank < comm.size; rank++) {
                memcpy(o.to + rank * bytes + at, comm.meeting->staged[rank], some);
            }
        });
        break;
    case What::BROADCAST:
        chunked(comm, comm.rank == o.root ? o.from : nullptr, bytes, [&](size_t at, size_t some) {
            memcpy(o.to + at, comm.meeting->staged[o.root], some);
        });
        break;
    case What::ALL_REDUCE:
        chunked(comm, o.from, bytes, [&](size_t at, size_t some) { sum_staged(comm, o.to + at, some, o.type); });
        break;
    case What::REDUCE_SCATTER:
        for (int part = 0; part < comm.size; part++) {
            bool mine = part == comm.rank;
            if (!chunked(comm, o.from + part * bytes, bytes, [&](size_t at, size_t some) {
                    if (mine) {
                        sum_staged(comm, o.to + at, some, o.type);
                    }
                })) {
                break;
            }
        }
    }
}

int begin(Operation o) {
    if (!size_of(o.type) || o.comm->state == IN_PROGRESS || !depth) {
        return INVALID_USAGE;
    }
    group.push_back(o);
    return SUCCESS;
}

void later(std::chrono::microseconds delay) { std::this_thread::sleep_for(delay); }

} // namespace

#define CALL extern "C" __attribute__((visibility("default"))) int

CALL ncclGetUniqueId(Id* id) {
    memset(id, 0, sizeof *id);
    static std::atomic<int> groups{0};
    snprintf(id->name, sizeof id->name, "/stand-in-nccl-%d-%d-%ld", getpid(), groups++, long(time(nullptr)));
    int file = shm_open(id->name, O_RDWR | O_CREAT | O_EXCL, 0600);
    bool made = file >= 0 && ftruncate(file, sizeof(Meeting)) == 0;
    close(file);
    return made ? SUCCESS : SYSTEM;
}

CALL ncclCommInitRankConfig(Comm** to, int size, Id id, int rank, const char* config) {
    uint64_t bytes;
    uint32_t magic;
    int32_t blocking;
    memcpy(&bytes, config, 8);
    memcpy(&magic, config + 8, 4);
    memcpy(&blocking, config + 16, 4);
    if (bytes < 48 || magic != 0xcafebeef || blocking != 0 || size > MOST) {
        return INVALID_ARGUMENT;
    }
    int file = shm_open(id.name, O_RDWR, 0600);
    void* memory = file < 0 ? MAP_FAILED : mmap(nullptr, sizeof(Meeting), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (memory == MAP_FAILED) {
        return SYSTEM;
    }
    auto* comm = new Comm{static_cast<Meeting*>(memory), rank, size};
    comm->meeting->joined++;
    std::thread([comm, id] {
        while (comm->meeting->joined < uint32_t(comm->size) && !comm->aborted) {
            later(std::chrono::microseconds(500));
        }
        shm_unlink(id.name);
        comm->state = SUCCESS;
    }).detach();
    *to = comm;
    return IN_PROGRESS;
}

CALL ncclCommGetAsyncError(Comm* comm, int* state) { return *state = comm->state, SUCCESS; }
CALL ncclGroupStart() { return depth++, SUCCESS; }
CALL ncclGroupEnd() {
    if (--depth > 0 || group.empty()) {
        return SUCCESS;
    }
    Comm* comm = group[0].comm;
    comm->state = IN_PROGRESS;
    // The library may take its time before anything is on the stream.
    std::thread([comm, operations = std::move(group)] {
        later(std::chrono::microseconds(300));
        auto put = reinterpret_cast<int (*)(void*, void (*)(void*), void*)>(dlsym(RTLD_DEFAULT, "stand_in_put"));
        for (const Operation& operation : operations) {
            auto run_one = [](void* with) {
                run(*static_cast<Operation*>(with));
                delete static_cast<Operation*>(with);
            };
            put(operation.stream, run_one, new Operation(operation));
        }
        comm->state = SUCCESS;
    }).detach();
    group = {};
    return IN_PROGRESS;
}
CALL ncclAllGather(const unsigned char* from, unsigned char* to, size_t count, int type, Comm* comm, void* stream) {
    return begin({What::ALL_GATHER, from, to, count, type, 0, comm, stream});
}
CALL ncclBroadcast(const unsigned char* from, unsigned char* to, size_t count, int type, int root, Comm* comm, void* stream) {
    return begin({What::BROADCAST, from, to, count, type, root, comm, stream});
}
CALL ncclAllReduce(const unsigned char* from, unsigned char* to, size_t count, int type, int sum, Comm* comm, void* stream) {
    return sum ? INVALID_ARGUMENT : begin({What::ALL_REDUCE, from, to, count, type, 0, comm, stream});
}
CALL ncclReduceScatter(const unsigned char* from, unsigned char* to, size_t count, int type, int sum, Comm* comm, void* stream) {
    return sum ? INVALID_ARGUMENT : begin({What::REDUCE_SCATTER, from, to, count, type, 0, comm, stream});
}
CALL ncclCommAbort(Comm* comm) { return comm->aborted = true, SUCCESS; }
CALL ncclCommFinalize(Comm*) { return SUCCESS; }
CALL ncclCommDestroy(Comm* comm) { return comm->aborted = true, SUCCESS; }

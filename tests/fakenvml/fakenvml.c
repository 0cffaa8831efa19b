/* A libnvidia-ml.so.1 that has no driver and no card: every answer is in the INI file named by
 * FAKE_NVML_CONF, which is read once, at the first nvmlInit.
 *
 *   [library]             the library as a whole: init, driver, nvml, cuda, confidential;
 *                         prints is a text that it writes to standard output
 *   [gpu]                 a card, once for each; bus_id says where it is
 *   key = value           numbers are separated by commas
 *   key = !15             that question answers with this error of nvml.h
 *   key = hang            it never returns, nor does a SIGTERM end it
 *   key = deaf            as hang, and no SIGALRM either
 *   key = crash           it ends the process by a segmentation fault
 *   key = abort           it ends the process as glibc does on a broken heap
 *   (no such key)         it is not supported
 *   error = 15            every question about this card, and its handle, answers so
 *   handle = !15          only the way to its handle does: hang and crash as well
 *   lost_after = 5        the card is lost after that many questions
 *
 * Symbols which are not here are added as stubs, "not supported", when the library is built.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    GPU_IS_LOST = 15,
    GPU_NOT_FOUND = 28,
};

enum { INIT_FLAG_NO_GPUS = 1 };

typedef unsigned int u32;
typedef unsigned long long u64;

struct entry {
    char key[40], value[216];
};

typedef struct section {
    struct entry entries[128];
    int count;
    int asked;
} *device;

static struct section library, gpus[64];
static u32 gpu_count;
static int initialized;

/* ---- the scenario */

static char *trim(char *text)
{
    char *end = text + strlen(text);

    while (end > text && strchr(" \t\r\n", end[-1]))
        *--end = 0;
    return text + strspn(text, " \t");
}

static void read_scenario(void)
{
    const char *path = getenv("FAKE_NVML_CONF");
    FILE *file = fopen(path ? path : "/etc/fakenvml.ini", "r");
    struct section *section = &library;
    char line[512];

    memset(&library, 0, sizeof library);
    memset(gpus, 0, sizeof gpus);
    gpu_count = 0;
    while (file && fgets(line, sizeof line, file)) {
        char *text = trim(line), *equals = strchr(text, '=');

        if (*text == '[') {
            int is_gpu = !strcmp(text, "[gpu]") && gpu_count < 64;
            section = is_gpu ? &gpus[gpu_count++] : &library;
        } else if (equals && *text != '#' && section->count < 128) {
            struct entry *entry = &section->entries[section->count++];
            *equals = 0;
            snprintf(entry->key, sizeof entry->key, "%s", trim(text));
            snprintf(entry->value, sizeof entry->value, "%s", trim(equals + 1));
        }
    }
    if (file)
        fclose(file);
}

static const char *lookup(const struct section *section, const char *key)
{
    for (int i = 0; i < section->count; i++)
        if (!strcmp(section->entries[i].key, key))
            return section->entries[i].value;
    return NULL;
}

/* What stands for a value: an error, or something that never comes back. */
static int behave(const char *value)
{
    int deaf = !strcmp(value, "deaf");

    if (deaf || !strcmp(value, "hang")) {
        signal(SIGTERM, SIG_IGN);
        if (deaf)
            signal(SIGALRM, SIG_IGN);
        for (;;)
            sleep(1000);
    }
    if (!strcmp(value, "crash")) {
        signal(SIGSEGV, SIG_DFL);
        raise(SIGSEGV);
    }
    if (!strcmp(value, "abort"))
        abort();
    return *value == '!' ? atoi(value + 1) : SUCCESS;
}

static int ask(device section, const char *key, const char **value)
{
    const char *error, *after;

    if (!initialized)
        return UNINITIALIZED;
    if (!section)
        return INVALID_ARGUMENT;
    after = lookup(section, "lost_after");
    if (after && section->asked++ >= atoi(after))
        return GPU_IS_LOST;
    error = lookup(section, "error");
    if (error)
        return atoi(error);
    *value = lookup(section, key);
    return *value ? behave(*value) : NOT_SUPPORTED;
}

/* As many numbers as the value holds, at most `most`; the others stay 0. */
static int numbers(device section, const char *key, u64 *found, int most, int *count)
{
    const char *text;
    int result = ask(section, key, &text), number = 0;

    memset(found, 0, most * sizeof *found);
    while (!result && *text && number < most) {
        char *end;
        found[number] = strtoull(text, &end, 0);
        if (end == text)
            break;
        number++;
        text = end + strspn(end, " ,");
    }
    if (count)
        *count = number;
    return result;
}

static int one_number(device section, const char *key, u32 *answer)
{
    u64 found;
    int result = numbers(section, key, &found, 1, NULL);

    if (!result)
        *answer = found;
    return result;
}

static int two_numbers(device section, const char *key, u32 *first, u32 *second)
{
    u64 found[2];
    int result = numbers(section, key, found, 2, NULL);

    if (!result) {
        *first = found[0];
        *second = found[1];
    }
    return result;
}

static int wide_number(device section, const char *key, u64 *answer)
{
    u64 found;
    int result = numbers(section, key, &found, 1, NULL);

    if (!result)
        *answer = found;
    return result;
}

static int nth_number(device section, const char *key, u32 which, u64 *answer)
{
    u64 found[8];
    int count, result = numbers(section, key, found, 8, &count);

    if (!result && which >= (u32)count)
        return NOT_SUPPORTED;
    if (!result)
        *answer = found[which];
    return result;
}

static int text(device section, const char *key, char *buffer, u32 size)
{
    const char *value;
    int result = ask(section, key, &value);

    if (result)
        return result;
    if (strlen(value) >= size)
        return INSUFFICIENT_SIZE;
    strcpy(buffer, value);
    return SUCCESS;
}

/* ---- the library */

int nvmlInitWithFlags(u32 flags)
{
    const char *init, *prints;
    int result;

    if (initialized)
        return SUCCESS;
    read_scenario();
    prints = lookup(&library, "prints");
    if (prints) {
        puts(prints);
        fflush(stdout);
    }
    if (!gpu_count && !(flags & INIT_FLAG_NO_GPUS))
        return GPU_NOT_FOUND;
    init = lookup(&library, "init");
    result = init ? behave(init) : SUCCESS;
    initialized = !result;
    return result;
}

int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int result)
{
    static char words[40];

    snprintf(words, sizeof words, "error %d of the fake NVML", result);
    return words;
}

int nvmlSystemGetDriverVersion(char *buffer, u32 size)
{
    return text(&library, "driver", buffer, size);
}

int nvmlSystemGetNVMLVersion(char *buffer, u32 size)
{
    return text(&library, "nvml", buffer, size);
}

int nvmlSystemGetCudaDriverVersion(u32 *version) { return one_number(&library, "cuda", version); }

int nvmlSystemGetCudaDriverVersion_v2(u32 *version)
{
    return one_number(&library, "cuda", version);
}

struct confidential_state {
    u32 environment, feature, devtools;
};

int nvmlSystemGetConfComputeState(struct confidential_state *state)
{
    memset(state, 0, sizeof *state);
    return one_number(&library, "confidential", &state->feature);
}

/* ---- the cards */

int nvmlDeviceGetCount_v2(u32 *count)
{
    *count = gpu_count;
    return SUCCESS;
}

static int handle_of(device gpu, device *handle)
{
    const char *error = lookup(gpu, "error"), *behaviour = lookup(gpu, "handle");

    *handle = gpu;
    if (error)
        return atoi(error);
    return behaviour ? behave(behaviour) : SUCCESS;
}

static int handle_by(const char *key, const char *wanted, device *handle)
{
    for (u32 i = 0; i < gpu_count; i++) {
        const char *value = lookup(&gpus[i], key);
        if (value && !strcmp(value, wanted))
            return handle_of(&gpus[i], handle);
    }
    return NOT_FOUND;
}

struct address {
    u32 domain, bus, device, function;
};

static int parse_address(const char *text, struct address *found)
{
    memset(found, 0, sizeof *found);
    return sscanf(text, "%x:%x:%x.%x", &found->domain, &found->bus, &found->device,
                  &found->function) >= 3;
}

int nvmlDeviceGetHandleByPciBusId_v2(const char *wanted, device *handle)
{
    struct address here, there;

    if (!parse_address(wanted, &there))
        return INVALID_ARGUMENT;
    for (u32 i = 0; i < gpu_count; i++) {
        const char *value = lookup(&gpus[i], "bus_id");
        if (value && parse_address(value, &here) && !memcmp(&here, &there, sizeof here))
            return handle_of(&gpus[i], handle);
    }
    return NOT_FOUND;
}

int nvmlDeviceGetHandleByIndex_v2(u32 index, device *handle)
{
    return index < gpu_count ? handle_of(&gpus[index], handle) : INVALID_ARGUMENT;
}

int nvmlDeviceGetHandleByUUID(const char *wanted, device *handle)
{
    return handle_by("uuid", wanted, handle);
}

int nvmlDeviceGetHandleBySerial(const char *wanted, device *handle)
{
    return handle_by("serial", wanted, handle);
}

int nvmlDeviceGetIndex(device gpu, u32 *index)
{
    *index = gpu - gpus;
    return SUCCESS;
}

int nvmlDeviceGetMinorNumber(device gpu, u32 *number) { return nvmlDeviceGetIndex(gpu, number); }

struct pci_info {
    char legacy[16];
    u32 domain, bus, device, id, subsystem;
    char bus_id[32];
};

int nvmlDeviceGetPciInfo_v3(device gpu, struct pci_info *info)
{
    const char *value;
    struct address at;
    int result = ask(gpu, "bus_id", &value);

    if (result || !parse_address(value, &at))
        return result ? result : INVALID_ARGUMENT;
    memset(info, 0, sizeof *info);
    info->domain = at.domain;
    info->bus = at.bus;
    info->device = at.device;
    snprintf(info->legacy, sizeof info->legacy, "%04X:%02X:%02X.%X", at.domain & 0xffff,
             at.bus & 0xff, at.device & 0x1f, at.function & 7);
    snprintf(info->bus_id, sizeof info->bus_id, "%08X:%02X:%02X.%X", at.domain, at.bus & 0xff,
             at.device & 0x1f, at.function & 7);
    one_number(gpu, "pci_id", &info->id);
    return SUCCESS;
}

#define TEXT(function, key) \
    int function(device gpu, char *buffer, u32 size) { return text(gpu, key, buffer, size); }
#define NUMBER(function, key) \
    int function(device gpu, u32 *answer) { return one_number(gpu, key, answer); }
#define WIDE(function, key) \
    int function(device gpu, u64 *answer) { return wide_number(gpu, key, answer); }
#define PAIR(function, key)                            \
    int function(device gpu, u32 *first, u32 *second)    \
    {                                                    \
        return two_numbers(gpu, key, first, second);     \
    }

TEXT(nvmlDeviceGetName, "name")
TEXT(nvmlDeviceGetUUID, "uuid")
TEXT(nvmlDeviceGetSerial, "serial")
TEXT(nvmlDeviceGetVbiosVersion, "vbios")
TEXT(nvmlDeviceGetInforomImageVersion, "inforom")
NUMBER(nvmlDeviceGetRetiredPagesPendingStatus, "retired_pending")
NUMBER(nvmlDeviceGetCurrPcieLinkGeneration, "pcie_gen")
NUMBER(nvmlDeviceGetMaxPcieLinkGeneration, "pcie_gen_max")
NUMBER(nvmlDeviceGetCurrPcieLinkWidth, "pcie_width")
NUMBER(nvmlDeviceGetMaxPcieLinkWidth, "pcie_width_max")
NUMBER(nvmlDeviceGetPcieReplayCounter, "pcie_replays")
NUMBER(nvmlDeviceGetPowerUsage, "power")
NUMBER(nvmlDeviceGetEnforcedPowerLimit, "power_enforced")
NUMBER(nvmlDeviceGetPowerManagementLimit, "power_limit")
NUMBER(nvmlDeviceGetPowerManagementDefaultLimit, "power_default")
NUMBER(nvmlDeviceGetPerformanceState, "performance_state")
NUMBER(nvmlDeviceGetFanSpeed, "fan")
NUMBER(nvmlDeviceGetPersistenceMode, "persistence")
NUMBER(nvmlDeviceGetComputeMode, "compute_mode")
NUMBER(nvmlDeviceGetDisplayMode, "display")
NUMBER(nvmlDeviceGetDisplayActive, "display")
WIDE(nvmlDeviceGetCurrentClocksThrottleReasons, "clock_reasons")
PAIR(nvmlDeviceGetEccMode, "ecc")
PAIR(nvmlDeviceGetMigMode, "mig")
PAIR(nvmlDeviceGetPowerManagementLimitConstraints, "power_range")
PAIR(nvmlDeviceGetEncoderUtilization, "encoder")
PAIR(nvmlDeviceGetDecoderUtilization, "decoder")
PAIR(nvmlDeviceGetCudaComputeCapability, "compute_capability")

int nvmlDeviceGetGspFirmwareVersion(device gpu, char *version)
{
    return text(gpu, "gsp", version, 64);
}

int nvmlDeviceValidateInforom(device gpu)
{
    const char *value;

    return ask(gpu, "inforom_check", &value);
}

/* Each call takes the next of the values, and the last again and again. */
int nvmlDeviceGetCurrentClocksEventReasons(device gpu, u64 *reasons)
{
    static int calls[64];
    u64 found[8];
    int count, result = numbers(gpu, "clock_events", found, 8, &count);

    if (!result && count) {
        int *made = &calls[gpu - gpus];
        *reasons = found[*made < count ? *made : count - 1];
        ++*made;
    }
    return result;
}

/* ---- memory */

int nvmlDeviceGetRemappedRows(device gpu, u32 *correctable, u32 *uncorrectable, u32 *pending,
                              u32 *failure)
{
    u64 found[4];
    int result = numbers(gpu, "remapped", found, 4, NULL);

    *correctable = found[0];
    *uncorrectable = found[1];
    *pending = found[2];
    *failure = found[3];
    return result;
}

/* retired = SINGLE,DOUBLE: how many pages were retired for each cause. */
int nvmlDeviceGetRetiredPages(device gpu, u32 cause, u32 *count, u64 *addresses)
{
    u64 pages;
    u32 room = *count;
    int result = nth_number(gpu, "retired", cause, &pages);

    if (result)
        return result;
    *count = pages;
    if (pages > room || (pages && !addresses))
        return INSUFFICIENT_SIZE;
    for (u32 i = 0; i < pages; i++)
        addresses[i] = 0x1000 * (i + 1);
    return SUCCESS;
}

struct versioned_flag {
    u32 version, flag;
};

int nvmlDeviceGetUnrepairableMemoryFlag_v1(device gpu, struct versioned_flag *answer)
{
    return one_number(gpu, "unrepairable_memory", &answer->flag);
}

/* ecc_volatile, ecc_aggregate = CORRECTED,UNCORRECTED */
int nvmlDeviceGetTotalEccErrors(device gpu, u32 type, u32 counter, u64 *errors)
{
    return nth_number(gpu, counter ? "ecc_aggregate" : "ecc_volatile", type, errors);
}

struct sram_status {
    u32 version;
    u64 counters[11];
    u32 exceeded;
};

int nvmlDeviceGetSramEccErrorStatus(device gpu, struct sram_status *status)
{
    return one_number(gpu, "sram_exceeded", &status->exceeded);
}

struct memory {
    u64 total, free, used;
};

/* memory = TOTAL,USED,RESERVED; only version 2 tells what is reserved from what is used. */
int nvmlDeviceGetMemoryInfo(device gpu, struct memory *memory)
{
    u64 found[3];
    int result = numbers(gpu, "memory", found, 3, NULL);

    memory->total = found[0];
    memory->used = found[1] + found[2];
    memory->free = memory->total - memory->used;
    return result;
}

struct memory_v2 {
    u32 version;
    u64 total, reserved, free, used;
};

int nvmlDeviceGetMemoryInfo_v2(device gpu, struct memory_v2 *memory)
{
    u64 found[3];
    int result = numbers(gpu, "memory", found, 3, NULL);

    memory->total = found[0];
    memory->used = found[1];
    memory->reserved = found[2];
    memory->free = found[0] - found[1] - found[2];
    return result;
}

int nvmlDeviceGetBAR1MemoryInfo(device gpu, struct memory *memory)
{
    u64 found[2];
    int result = numbers(gpu, "bar1", found, 2, NULL);

    memory->total = found[0];
    memory->used = found[1];
    memory->free = found[0] - found[1];
    return result;
}

/* ---- heat, clocks, load */

int nvmlDeviceGetTemperature(device gpu, u32 sensor, u32 *degrees)
{
    (void)sensor;
    return one_number(gpu, "temperature", degrees);
}

struct temperature {
    u32 version, sensor;
    int degrees;
};

/* A driver that has only the newer call: temperature_v instead of temperature. */
int nvmlDeviceGetTemperatureV(device gpu, struct temperature *answer)
{
    const char *key = lookup(gpu, "temperature_v") ? "temperature_v" : "temperature";

    return one_number(gpu, key, (u32 *)&answer->degrees);
}

struct margin {
    u32 version;
    int degrees;
};

int nvmlDeviceGetMarginTemperature(device gpu, struct margin *margin)
{
    return one_number(gpu, "temperature_margin", (u32 *)&margin->degrees);
}

int nvmlDeviceGetTemperatureThreshold(device gpu, u32 threshold, u32 *degrees)
{
    u64 found;
    int result = nth_number(gpu, "temperature_thresholds", threshold, &found);

    if (!result)
        *degrees = found;
    return result;
}

/* clocks, clocks_max = GRAPHICS,SM,MEMORY,VIDEO */
int nvmlDeviceGetClockInfo(device gpu, u32 domain, u32 *clock)
{
    u64 found;
    int result = nth_number(gpu, "clocks", domain, &found);

    if (!result)
        *clock = found;
    return result;
}

int nvmlDeviceGetMaxClockInfo(device gpu, u32 domain, u32 *clock)
{
    u64 found;
    int result = nth_number(gpu, "clocks_max", domain, &found);

    if (!result)
        *clock = found;
    return result;
}

struct utilization {
    u32 gpu, memory;
};

int nvmlDeviceGetUtilizationRates(device gpu, struct utilization *rates)
{
    return two_numbers(gpu, "utilization", &rates->gpu, &rates->memory);
}

/* ---- NVLink */

/* nvlink = one character for each link: 1 is up, 0 is down, - has no such link */
int nvmlDeviceGetNvLinkState(device gpu, u32 link, u32 *active)
{
    const char *value;
    int result = ask(gpu, "nvlink", &value);

    if (result)
        return result;
    if (link >= strlen(value))
        return INVALID_ARGUMENT;
    if (value[link] == '-')
        return NOT_SUPPORTED;
    *active = value[link] - '0';
    return SUCCESS;
}

/* nvlink_errors.LINK = REPLAY,RECOVERY,CRC_FLIT,CRC_DATA,ECC_DATA */
int nvmlDeviceGetNvLinkErrorCounter(device gpu, u32 link, u32 counter, u64 *errors)
{
    char key[32];

    snprintf(key, sizeof key, "nvlink_errors.%u", link);
    return nth_number(gpu, key, counter, errors);
}

struct fabric_v2 {
    u32 version;
    unsigned char cluster[16];
    u32 status, clique, state, health;
};

/* fabric = STATE,STATUS,HEALTH */
int nvmlDeviceGetGpuFabricInfoV(device gpu, struct fabric_v2 *fabric)
{
    u64 found[3];
    int result = numbers(gpu, "fabric", found, 3, NULL);

    fabric->state = found[0];
    fabric->status = found[1];
    fabric->health = found[2];
    return result;
}

/* ---- field values */

struct field {
    u32 id, scope;
    long long timestamp, latency;
    u32 type;
    int result;
    union {
        double real;
        u32 small;
        u64 wide;
        long long wide_signed;
        int small_signed;
        unsigned short tiny;
    } value;
};

/* What a field's value is when its type is written before it, as in "uint 3". */
static void typed(const char *value, struct field *field)
{
    /* The rest of the union is whatever was there: reading too much of it shows. */
    memset(&field->value, 0xee, sizeof field->value);
    if (!strncmp(value, "double ", 7)) {
        field->type = 0;
        field->value.real = atof(value + 7);
    } else if (!strncmp(value, "uint ", 5)) {
        field->type = 1;
        field->value.small = strtoul(value + 5, NULL, 0);
    } else if (!strncmp(value, "slong ", 6)) {
        field->type = 4;
        field->value.wide_signed = atoll(value + 6);
    } else if (!strncmp(value, "sint ", 5)) {
        field->type = 5;
        field->value.small_signed = atoi(value + 5);
    } else if (!strncmp(value, "ushort ", 7)) {
        field->type = 6;
        field->value.tiny = atoi(value + 7);
    } else {
        field->type = atoi(value) < 0 ? 99 : 3;
        field->value.wide = strtoull(value, NULL, 0);
    }
}

/* field.NUMBER, or field.NUMBER.SCOPE; a negative value has a type that nobody knows. */
int nvmlDeviceGetFieldValues(device gpu, int count, struct field *fields)
{
    for (int i = 0; i < count; i++) {
        const char *value;
        char key[32];

        snprintf(key, sizeof key, "field.%u.%u", fields[i].id, fields[i].scope);
        if (!lookup(gpu, key))
            snprintf(key, sizeof key, "field.%u", fields[i].id);
        fields[i].result = ask(gpu, key, &value);
        if (!fields[i].result)
            typed(value, &fields[i]);
        if (fields[i].result == GPU_IS_LOST)
            return GPU_IS_LOST;
    }
    return SUCCESS;
}

/* ---- processes */

struct process {
    u32 pid;
    u64 memory;
    u32 gpu_instance, compute_instance;
};

/* compute, graphics = PID,PID,...; 0 is nobody */
static int list_processes(device gpu, const char *key, u32 *count, struct process *processes)
{
    u64 pids[32];
    u32 room = *count;
    int found, result = numbers(gpu, key, pids, 32, &found);

    if (result)
        return result;
    if (found && !pids[0])
        found = 0;
    *count = found;
    if ((u32)found > room || (found && !processes))
        return INSUFFICIENT_SIZE;
    for (int i = 0; i < found; i++)
        processes[i] = (struct process){(u32)pids[i], 1 << 20, ~0u, ~0u};
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(device gpu, u32 *count, struct process *processes)
{
    return list_processes(gpu, "compute", count, processes);
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(device gpu, u32 *count, struct process *processes)
{
    return list_processes(gpu, "graphics", count, processes);
}

/* compute_v2: a driver that has only the older call */
int nvmlDeviceGetComputeRunningProcesses_v2(device gpu, u32 *count, struct process *processes)
{
    return list_processes(gpu, "compute_v2", count, processes);
}

-- Wireshark dissector for the tunnel protocol over QUIC: stream preambles, ConnectRequest, ConnectResponse, RPC streams.
--
-- Use: tshark -X lua_script:tunnel.lua -r FILE, or copy it into Wireshark's plugin directory
-- (Help > About > Folders > Personal Lua Plugins). It takes what QUIC carries under the ALPN name argotunnel.
-- Decryption needs the TLS secrets: captures exported by `connector capture export` have them inside.

local tunnel = Proto("cftunnel", "Cloudflare tunnel over QUIC")
local f = tunnel.fields
f.kind = ProtoField.string("cftunnel.kind", "Kind")
f.signature = ProtoField.bytes("cftunnel.signature", "Signature")
f.version = ProtoField.string("cftunnel.version", "Version")
f.type = ProtoField.uint16("cftunnel.type", "Type", base.DEC, { [0] = "http", [1] = "websocket", [2] = "tcp" })
f.dest = ProtoField.string("cftunnel.dest", "Destination")
f.error = ProtoField.string("cftunnel.error", "Error")
f.key = ProtoField.string("cftunnel.metadata.key", "Key")
f.value = ProtoField.string("cftunnel.metadata.value", "Value")
f.metadata = ProtoField.string("cftunnel.metadata", "Metadata")
f.segments = ProtoField.uint32("cftunnel.rpc.segments", "Segments")
f.payload = ProtoField.bytes("cftunnel.payload", "Payload")

local malformed = ProtoExpert.new("cftunnel.malformed.expert", "Malformed message", expert.group.MALFORMED, expert.severity.ERROR)
tunnel.experts = { malformed }

local DATA, RPC = "0a36cd12a13e", "52bb825cdb65"
local LARGEST_LIST = 4096

-- A pointer word at `at` (offset in the segment): where it leads, and its parts. nil when it leads outside.
local function follow(segment, at)
  if at < 0 or at + 8 > segment:len() then return nil end
  local low, high = segment(at, 4):le_uint(), segment(at + 4, 4):le_uint()
  if low == 0 and high == 0 then return nil end
  local offset = bit32 and bit32.rshift(low, 2) or math.floor(low / 4)
  if offset >= 0x20000000 then offset = offset - 0x40000000 end
  return at + 8 + 8 * offset, low % 4, high
end

local function text(segment, at)
  local target, kind, high = follow(segment, at)
  if not target or kind ~= 1 or high % 8 ~= 2 then return nil end
  local size = math.floor(high / 8)
  if target < 0 or size < 1 or target + size > segment:len() then return nil end
  return segment(target, size), segment(target, size - 1 > 0 and size - 1 or 1)
end

local function string_of(segment, at)
  local whole, inner = text(segment, at)
  if not whole then return "", nil end
  return whole:len() > 1 and inner:string() or "", whole
end

local function metadata(segment, at, tree)
  local target, kind, high = follow(segment, at)
  if not target or kind ~= 1 or high % 8 ~= 7 or target < 0 or target + 8 > segment:len() then return end
  local count = math.floor(segment(target, 4):le_uint() / 4)
  local words, pointers = segment(target + 4, 2):le_uint(), segment(target + 6, 2):le_uint()
  if pointers < 2 then return end
  for number = 0, math.min(count, LARGEST_LIST) - 1 do
    local element = target + 8 + number * 8 * (words + pointers) + 8 * words
    if element + 16 > segment:len() then return end
    local key, key_range = string_of(segment, element)
    local value, value_range = string_of(segment, element + 8)
    if key_range then
      local item = tree:add(f.metadata, key_range, key .. ": " .. value)
      item:add(f.key, key_range, key)
      if value_range then item:add(f.value, value_range, value) end
    end
  end
end

-- One framed message of one segment, ConnectRequest or ConnectResponse; returns kind, summary and its length.
local function connect(range, tree)
  if range:len() < 16 then return nil end
  local segments, words = range(0, 4):le_uint() + 1, range(4, 4):le_uint()
  local size = 8 + 8 * words
  if segments ~= 1 or size > range:len() or words < 1 then return nil end
  local segment = range(8, 8 * words)
  local root, kind, high = follow(segment, 0)
  if not root or kind ~= 0 then return nil end
  local data, pointers = high % 65536, math.floor(high / 65536)
  if root < 0 or root + 8 * (data + pointers) > segment:len() then return nil end
  local body = root + 8 * data
  local first, first_range = "", nil
  if pointers > 0 then first, first_range = string_of(segment, body) end
  if data >= 1 then
    local branch = tree:add(tunnel, range(0, size), "ConnectRequest")
    branch:add_le(f.type, segment(root, 2))
    if first_range then branch:add(f.dest, first_range, first) end
    if pointers > 1 then metadata(segment, body + 8, branch) end
    return "ConnectRequest", first, size
  end
  local branch = tree:add(tunnel, range(0, size), "ConnectResponse")
  if first ~= "" then branch:add(f.error, first_range, first) end
  if pointers > 1 then metadata(segment, body + 8, branch) end
  return "ConnectResponse", first, size
end

function tunnel.dissector(buffer, pinfo, tree)
  local length = buffer:len()
  if length == 0 then return 0 end
  local branch = tree:add(tunnel, buffer())
  local opening = length >= 6 and buffer(0, 6):bytes():tohex(true) or ""
  if opening == DATA and length >= 8 then
    branch:add(f.signature, buffer(0, 6))
    branch:add(f.version, buffer(6, 2))
    local kind, summary, size = connect(buffer(8):range(), branch)
    if not kind then
      branch:add_proto_expert_info(malformed)
      return length
    end
    branch:add(f.kind, buffer(0, 8), kind)
    pinfo.cols.protocol = "TUNNEL"
    pinfo.cols.info:append(" " .. kind .. " " .. summary)
    if 8 + size < length then branch:add(f.payload, buffer(8 + size)) end
  elseif opening == RPC then
    branch:add(f.signature, buffer(0, 6))
    branch:add(f.kind, buffer(0, 6), "RPC")
    pinfo.cols.protocol = "TUNNEL"
    pinfo.cols.info:append(" RPC stream")
    if length > 6 then branch:add(f.payload, buffer(6)) end
  else
    branch:add(f.payload, buffer())
  end
  return length
end

for _, name in ipairs({ "quic.proto", "tls.alpn" }) do
  local ok, list = pcall(DissectorTable.get, name)
  if ok and list then pcall(list.add, list, "argotunnel", tunnel) end
end

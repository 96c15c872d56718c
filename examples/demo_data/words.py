"""Word lists from which the synthetic tasks draw their keys and values."""

KEYS_EN = (
    "name city country population age colour animal food price size weight height language author title year month "
    "day time place job sport team score owner brand model material shape taste season river mountain street number "
    "phone email status level speed length width depth date song film book genre hobby school teacher subject grade "
    "room floor code kind origin distance capacity pet car"
).split()
KEYS_ZH = (
    "名字 城市 国家 人口 年龄 颜色 动物 食物 价格 大小 重量 身高 语言 作者 书名 年份 月份 时间 地点 职业 运动 "
    "球队 分数 品牌 材料 形状 味道 季节 河流 街道 电话 状态 速度 长度 日期 歌曲 电影 爱好 学校 老师 科目 房间"
).split()
COLOURS_EN = "red green blue yellow black white orange purple pink brown grey silver gold".split()
COLOURS_ZH = "红色 绿色 蓝色 黄色 黑色 白色 橙色 紫色 粉色 棕色 灰色 银色 金色".split()
CITIES_EN = (
    "Paris London Berlin Rome Madrid Tokyo Beijing Cairo Lima Moscow Bangkok Oslo Vienna Athens Dublin Delhi Seoul "
    "Sydney Toronto Chicago Boston Lisbon Prague Warsaw Helsinki Havana Nairobi Munich Milan Geneva"
).split()
CITIES_ZH = (
    "北京 上海 广州 深圳 杭州 南京 成都 武汉 西安 重庆 天津 苏州 长沙 青岛 大连 厦门 昆明 巴黎 伦敦 东京 纽约 "
    "罗马 柏林 曼谷 首尔"
).split()
NAMES_EN = (
    "Anna Tom Maria John Lucy Peter Emma David Sara Paul Alice Mark Julia Leo Nina Max Clara Oscar Eva Felix Rosa "
    "Simon Laura Hugo Ella Adam Ivy Jack Mia Noah Olivia Henry Grace Sam Zoe"
).split()
NAMES_ZH = "小明 小红 小华 小丽 小刚 小美 小东 小雪 小龙 小芳 李明 王芳 张伟 刘洋 陈静 赵磊 周杰 吴敏 林涛 孙悦".split()
PETS_EN = "Momo Rex Luna Coco Milo Bella Ruby Toby Daisy Lola Oreo Pip Biscuit Ginger Teddy Shadow Pepper Snowy".split()
PETS_ZH = "咪咪 旺财 豆豆 花花 球球 小黑 小白 毛毛 乐乐 团团 圆圆 可乐 布丁 汤圆 糖果 雪球".split()
FOODS_EN = "rice bread soup pizza pasta cheese apples noodles fish salad cake honey chocolate eggs beans corn".split()
FOODS_ZH = "米饭 面包 饺子 面条 苹果 香蕉 烤鸭 火锅 豆腐 鸡蛋 蛋糕 西瓜 葡萄 牛肉 鱼汤 月饼".split()
ANIMALS_EN = "cat dog horse panda tiger lion rabbit whale eagle llama sheep monkey dolphin owl bear fox".split()
ANIMALS_ZH = "小猫 小狗 大马 熊猫 老虎 狮子 兔子 鲸鱼 老鹰 羊驼 绵羊 猴子 海豚 猫头鹰 大象 狐狸".split()
SPORTS_EN = "tennis football swimming running chess cycling skiing hockey boxing golf sailing climbing".split()
SPORTS_ZH = "网球 足球 游泳 跑步 象棋 骑车 滑雪 篮球 排球 羽毛球 乒乓球 爬山".split()
PLAIN_EN = (
    "small large new old fast slow open closed wood stone metal glass paper round square sweet sour salty spring "
    "summer autumn winter English Chinese French German doctor teacher farmer pilot cook writer north south east "
    "west music garden bridge window table lamp cloud river ocean forest island winter apple lemon piano guitar"
).split()
PLAIN_ZH = (
    "很小 很大 全新 古老 打开 关闭 木头 石头 金属 玻璃 圆形 方形 甜的 酸的 春天 夏天 秋天 冬天 中文 英文 医生 老师 "
    "农民 厨师 作家 音乐 花园 大桥 窗户 桌子 台灯 白云 森林 海岛 钢琴 吉他 飞机 火车 数学 历史"
).split()
UNITS_EN = "million thousand years dollars metres kilograms hours minutes days miles pages people".split()
UNITS_ZH = "万 岁 元 米 公斤 小时 分钟 天 公里 页 人".split()
SYLLABLES = (
    "ba be bo da de do fa fi ga go ka ki ko la le li lo lu ma me mi mo na ne ni no pa pe po ra re ri ro sa se si so "
    "ta te ti to va vi wa ya yo za zo ran len min sol tar ven dor kel"
).split()
COMMON_ZH = (
    "的一是不了人我在有他这中大来上国个到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可她里后小么心多天而能好都然没"
    "日于起还发成事只作当想看文无开手十用主行方又如前所本见经头面公同三已老从动两长知民样现分将外但身些与高意进把法此实回二理美"
    "点月明其种声全工己话儿者向情部正名定女问力机给等几很业最间新什打便位因重被走电四第门相次东政海口使教西再平真听世气信北少关"
    "并内加化由却代军产入先山五太水万市眼体别处总才场师书比住员九笑性通目华报立马命张活难神数件安表原车白应路期叫常提感金何更"
)

VALUES_EN = {
    "colour": COLOURS_EN,
    "city": CITIES_EN,
    "name": NAMES_EN,
    "pet": PETS_EN,
    "food": FOODS_EN,
    "animal": ANIMALS_EN,
    "sport": SPORTS_EN,
}
VALUES_ZH = {
    "colour": COLOURS_ZH,
    "city": CITIES_ZH,
    "name": NAMES_ZH,
    "pet": PETS_ZH,
    "food": FOODS_ZH,
    "animal": ANIMALS_ZH,
    "sport": SPORTS_ZH,
}
